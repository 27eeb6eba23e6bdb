"""A trial is one configuration: every victim is purified with it and scored on `val`.

The trials of a group run at once, on one prepared victim (`bimask.population`), and each ends with the
numbers that it has alone. Plain functions; nothing here knows Ray, Optuna or MLflow.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bimask.config import ENGINE, PurifyConfig
from bimask.errors import NonFiniteError
from bimask.masks import MaskSet, fold
from bimask.metrics import EvalSets, Scores, evaluate
from bimask.population import PopulationPurifier
from bimask.result import Passes, RoundLog
from bimask.victim import Victim
from study.checkpoint import Checkpoints
from study.config import StudyConfig

SCORES = ("clean_accuracy", "attack_success", "recovery")


@dataclass(frozen=True)
class Case:
    """What a trial needs of one victim; it holds `val` and never sees `test`.

    Attributes:
        name: of the victim in this study.
        victim: with its own scores.
        clean: the defender's images, (N, C, H, W) float in [0, 1].
        val: evaluation sets to choose on; they know the true trigger (`oracle` selection).
    """

    name: str
    victim: Victim
    clean: Tensor
    val: EvalSets

    @classmethod
    def of(cls, name: str, victim: Victim, config: StudyConfig) -> Case:
        """The case of a victim in a study: its clean subset is drawn from the training split."""
        splits = victim.spec.load_data()
        clean = splits.train.clean_subset(config.clean_images_per_class, seed=config.seed)
        return cls(name, victim, clean.floats(), victim.eval_sets(splits, "val"))


@dataclass(frozen=True)
class CaseResult:
    """What one purification of a trial ended with."""

    scores: Scores
    masks: MaskSet
    rounds: list[RoundLog]
    passes: Passes


@dataclass(frozen=True)
class TrialResult:
    """Everything a finished trial leaves.

    Attributes:
        cases: victim name -> result.
        scores: mean over the victims of `SCORES`.
        seconds: the trial's share of its group's wall time, which is divided evenly.
    """

    cases: dict[str, CaseResult]
    scores: dict[str, float]
    seconds: float

    def record(self) -> dict[str, Any]:
        """The numbers that go into a trial's record, as JSON types."""
        return {
            **self.scores,
            "scores": {name: asdict(case.scores) for name, case in self.cases.items()},
            "passes": {
                "forward": sum(case.passes.forward for case in self.cases.values()),
                "backward": sum(case.passes.backward for case in self.cases.values()),
            },
            "rounds": sum(len(case.rounds) for case in self.cases.values()),
            "seconds": self.seconds,
        }


Report = Callable[[int, str, RoundLog, Scores], None]


def run_trials(
    configs: Sequence[PurifyConfig],
    cases: Sequence[Case],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    report_every: int = 10,
    on_report: Report | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[TrialResult | NonFiniteError]:
    """Purify each case with every configuration, all configurations at once.

    Args:
        configs: settings of the defence, one a trial.
        cases: victims; they are left as they are.
        seed: of the defence, the same for every trial; the same seed gives the same result on the
            same hardware, whatever else is in the group.
        on_report: called with the trial's position, the victim's name, the round and its scores on
            `val`, every `report_every` rounds.
        checkpoints: where the trials' states are kept, and gone on from if they are there.

    Returns:
        One result a configuration, or the error that ended this one alone: a loss or an objective is
        NaN or infinite. No number is ever made up for it.
    """
    started = time.perf_counter()
    results: list[dict[str, CaseResult]] = [{} for _ in configs]
    failures: dict[int, NonFiniteError] = {}
    for case in cases:
        model = copy.deepcopy(case.victim.model).to(device)
        clean, val = case.clean.to(device), case.val.to(device)
        for group in _populations(configs):
            running = [trial for trial in group if trial not in failures]
            if not running:
                continue

            def on_round(member: int, log: RoundLog, masks: MaskSet) -> None:
                if on_report is not None and (log.step + 1) % report_every == 0:
                    scores = evaluate(fold(model, masks), val, precision="bfloat16")  # noqa: B023
                    on_report(running[member], case.name, log, scores)  # noqa: B023

            population = PopulationPurifier(
                model,
                clean,
                [configs[trial] for trial in running],
                generators=[torch.Generator().manual_seed(seed) for _ in running],
                on_round=on_round,
            )
            if checkpoints is None:
                ended = population.run()
            else:
                ended = checkpoints.run(population, f"{case.name}.{group[0]}")
            for trial, result in zip(running, ended, strict=True):
                if isinstance(result, NonFiniteError):
                    failures[trial] = result
                else:
                    scores = evaluate(result.model(), val)
                    results[trial][case.name] = CaseResult(
                        scores, result.masks.cpu(), result.rounds, result.passes
                    )
    before = 0.0 if checkpoints is None else checkpoints.seconds
    seconds = (before + time.perf_counter() - started) / len(configs)
    return [failures.get(i) or _result(mine, seconds) for i, mine in enumerate(results)]


def _populations(configs: Sequence[PurifyConfig]) -> list[list[int]]:
    """Positions of the configurations that can share one prepared net, as `ENGINE` says."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, config in enumerate(configs):
        groups.setdefault(tuple(getattr(config, name) for name in ENGINE), []).append(position)
    return list(groups.values())


def _result(cases: dict[str, CaseResult], seconds: float) -> TrialResult | NonFiniteError:
    """A trial's result from those of its cases; the error where an objective is not finite."""
    means = {name: sum(getattr(r.scores, name) for r in cases.values()) / len(cases) for name in SCORES}
    for name, value in means.items():
        if not math.isfinite(value):
            return NonFiniteError(f"The objective {name} is {value}.")
    return TrialResult(cases, means, seconds)


def purified(model: nn.Module, tensors: dict[str, Tensor], config: PurifyConfig) -> nn.Module:
    """The purified model from saved masks."""
    masks = MaskSet.from_tensors(
        tensors, sharpness=config.sharpness, straight_through=config.straight_through
    )
    return fold(model, masks)
