"""What a trial is judged by: objectives by name, one number over all victims, and bounds on them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from bimask.tasks import Task
from study.spec.directions import DIRECTIONS, SCORES

ObjectiveName = Literal[
    "clean_accuracy", "attack_success", "recovery", "pruned_share", "seconds", "risk"
]
Numbers = Mapping[str, float]

# Of one purification, with the best that each can be: what is not known yet may turn out to be this.
BEST = {name: 1.0 if DIRECTIONS[name] == "maximize" else 0.0 for name in SCORES}
BEST |= {"pruned_share": 0.0, "risk": 0.0}


class Spread(TypedDict):
    """Mean, standard deviation (of a sample; 0 for one value), least, most and count of some values."""

    mean: float
    std: float
    min: float
    max: float
    n: int


def number(values: Mapping[str, object], name: str) -> float:
    """One number of a record, by its name.

    Raises:
        KeyError, TypeError: it is not there, or no number.
    """
    found = values[name]
    if not isinstance(found, int | float):
        raise TypeError(f"{name} is no number: {found!r}")
    return found


def numbers_in(values: Mapping[str, object], names: Iterable[str]) -> dict[str, float]:
    """Those of these numbers that a record has."""
    return {name: number(values, name) for name in names if name in values}


def known_scores(values: Mapping[str, object]) -> dict[str, float]:
    """Those of `SCORES` that are there: of a suspect, whose trigger nobody knows, the first alone."""
    return numbers_in(values, SCORES)


def quantities(values: Mapping[str, object]) -> dict[str, float]:
    """What objectives and constraints may be made of, as far as a trial's record has it."""
    return numbers_in(values, DIRECTIONS)


def backdoor_left(values: Mapping[str, object]) -> Literal["attack_success", "risk"]:
    """What says how much of a backdoor is left: `risk` where no attack success is known."""
    return "attack_success" if "attack_success" in values else "risk"


def numbers_of(
    task: Task, scores: Any, own: Numbers, *, before: float, said: Numbers | None = None
) -> dict[str, float]:
    """What objectives and constraints are made of, of one defended model.

    `own` is what the defence says of itself (`DefenceResult.numbers`), say the `pruned_share`;
    `accuracy_drop` is how far the task's clean quality fell from the victim's own, `before`, negative
    where the defended model is better; `risk` is among what a probe said, where there is one.
    """
    return {
        **known_scores(asdict(scores)),
        **own,
        "accuracy_drop": before - task.quality_of(scores),
        **{name: value for name, value in (said or {}).items() if name == "risk"},
    }


class Aggregate(BaseModel):
    """One number from those of several victims, each objective for itself.

    `mean`; `worst`, the worst victim's, which may be another one for every objective; `cvar`, the mean
    of the worst `alpha` of the victims (Rockafellar, Uryasev 2000), where a victim may count in part:
    alpha 1 is the mean, 1 / victims and less the worst. Risk is always the mean: how high it is depends
    on the victim, so that only the order of one victim's trials says something.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    rule: Literal["mean", "worst", "cvar"] = "mean"
    alpha: float = Field(0.5, gt=0, le=1, description="share of the victims that `cvar` looks at")

    @model_validator(mode="before")
    @classmethod
    def _by_its_name(cls, given: Any) -> Any:
        return {"rule": given} if isinstance(given, str) else given

    def of_losses(self, losses: Sequence[float]) -> float:
        """One loss from those of the victims, of which lower is better."""
        if self.rule == "mean":
            return sum(losses) / len(losses)
        counted = self.alpha * len(losses) if self.rule == "cvar" else 1.0
        weights = [min(1.0, max(0.0, counted - i)) for i in range(len(losses))]
        worst_first = sorted(losses, reverse=True)
        return sum(w * loss for w, loss in zip(weights, worst_first, strict=True)) / sum(weights)

    def __call__(self, name: str, values: Iterable[float]) -> float:
        """One value of the objective `name` from those of the victims."""
        if name == "risk" or name not in DIRECTIONS:  # what a defence says of itself has no worse end
            return statistics.fmean(values)
        sign = -1.0 if DIRECTIONS[name] == "maximize" else 1.0
        return sign * self.of_losses([sign * value for value in values])


class Bounds(BaseModel):
    """Bounds that a trial must hold to be chosen, on the numbers over all victims. Each task adds those
    of what it measures."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_accuracy_drop: float | None = Field(
        None, ge=0, le=1, description="of the task's clean quality, against the victims"
    )
    max_attack_success: float | None = Field(None, ge=0, le=1)
    max_pruned_share: float | None = Field(None, ge=0, le=1)
    max_seconds: float | None = Field(None, gt=0)

    def violations(self, values: Numbers) -> dict[str, float]:
        """Bound -> by how much it is broken; 0 or less where it holds. Unset bounds are left out."""
        found = {}
        for bound, limit in self.model_dump(exclude_none=True).items():
            kind, _, name = bound.partition("_")
            found[bound] = (values[name] - limit) * (1.0 if kind == "max" else -1.0)
        return found


class Constraints(Bounds):
    """Those of classifiers."""

    min_recovery: float | None = Field(None, ge=0, le=1)


def total_violation(violations: Numbers) -> float:
    """How far from feasible: the sum of what is broken, 0 for a feasible trial."""
    return sum(max(0.0, value) for value in violations.values())


def over_victims(
    rule: Aggregate, runs: Mapping[str, Sequence[Numbers]], *, seconds: float
) -> dict[str, float]:
    """A trial's numbers: the mean over a victim's runs, then `rule` over the victims.

    Args:
        runs: victim -> the numbers of each of its runs; those that every run has count.
        seconds: of the trial, which are a sum under every rule.
    """
    every = [run for mine in runs.values() for run in mine]
    names = [name for name in every[0] if all(name in run for run in every)]
    means = {
        name: [sum(run[name] for run in mine) / len(mine) for mine in runs.values()] for name in names
    }
    return {name: rule(name, values) for name, values in means.items()} | {"seconds": seconds}


def mean_of(runs: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The mean of every real number over runs with the same keys; the rest is the first run's."""
    return {
        key: sum(number(run, key) for run in runs) / len(runs) if isinstance(value, float) else value
        for key, value in runs[0].items()
    }


def spread(values: Sequence[float]) -> Spread:
    """The spread of some values."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }
