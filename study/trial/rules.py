"""What a trial's numbers come to, and when a trial is beaten: plain functions of a study's rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bimask.defences.settings import DefenceConfig
from bimask.tasks import defence_of
from study.analysis.pareto import losses
from study.spec.config import StudyConfig
from study.spec.directions import OBJECTIVES, Direction
from study.spec.objectives import BEST, Aggregate, Constraints, Numbers, Spread, over_victims, spread
from study.spec.stopping import EarlyStopping
from study.trial.history import StoppingBounds, rung
from study.trial.limits import projected_timeout

ABSENT = {"pruned_share": 0.0}  # of several defences: one that prunes nothing has pruned 0


class Run(Protocol):
    """One purification that a trial consists of: a victim's, perhaps one of several."""

    @property
    def key(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def before(self) -> float: ...


@dataclass(frozen=True)
class TrialRules:
    """The rules of a study, and what one trial is held against.

    Attributes:
        absent: numbers that not every defence says of itself -> what is understood where one does not.
        several: whether trials may be of several defences, so that a rung is of one of them.
        timeout: seconds that a trial may take, where the study says so.

    By default the rules are those of a study that says nothing: the mean over the victims, no bounds,
    and every trial runs to its end.
    """

    directions: Mapping[str, Direction] = field(default_factory=lambda: dict(OBJECTIVES))
    aggregate: Aggregate = field(default_factory=Aggregate)
    constraints: Constraints = field(default_factory=Constraints)
    early_stopping: EarlyStopping | None = None
    rivals: StoppingBounds = field(default_factory=StoppingBounds)
    absent: Mapping[str, float] = field(default_factory=dict)
    several: bool = False
    timeout: float | None = None

    @classmethod
    def of(cls, config: StudyConfig, rivals: StoppingBounds | None = None) -> TrialRules:
        """The judge of a study's trial that begins now."""
        return cls(
            config.directions,
            config.aggregate,
            config.constraints,
            config.early_stopping,
            rivals or StoppingBounds(),
            ABSENT if config.defenders.several else {},
            config.defenders.several,
            config.trial_timeout,
        )

    def numbers(self, own: Numbers) -> Numbers:
        """What a defence says of itself, with what is understood of those that do not say it."""
        return {**self.absent, **own}

    def values(
        self, runs: Sequence[Run], numbers: Mapping[str, Numbers], seconds: float
    ) -> dict[str, float]:
        """All quantities of a trial over its victims.

        Args:
            numbers: run -> its numbers; a run that is missing counts as the best that it can be.
            seconds: that the trial has taken.
        """
        by_victim: dict[str, list[Numbers]] = {}
        for run in runs:
            best = BEST | {"accuracy_drop": run.before - 1.0}
            by_victim.setdefault(run.name, []).append(numbers.get(run.key, best))
        return over_victims(self.aggregate, by_victim, seconds=seconds)

    def spreads(self, runs: Sequence[Run], numbers: Mapping[str, Numbers]) -> dict[str, Spread]:
        """Quantity -> its spread over the repeats, each over all victims; empty without repeats."""
        by_victim: dict[str, list[Numbers]] = {}
        for run in runs:
            by_victim.setdefault(run.name, []).append(numbers[run.key])
        repeats = [list(row) for row in zip(*by_victim.values(), strict=True)]
        if len(repeats) == 1:
            return {}
        return {
            name: spread([self.aggregate(name, [n[name] for n in row]) for row in repeats])
            for name in repeats[0][0]
        }

    def losses(self, values: Numbers) -> list[float]:
        """The objectives in order, signs turned so that low is good."""
        return [float(value) for value in losses([values], self.directions)[0]]

    def between(
        self, runs: Sequence[Run], numbers: Mapping[str, Numbers], seconds: float
    ) -> str | None:
        """Why a trial that has these numbers so far cannot reach the front any more, or None."""
        rules, left = self.early_stopping, len(runs) - len(numbers)
        if rules is None or not rules.dominated or not left or not self.rivals.front:
            return None
        could_be = self.values(runs, numbers, seconds)
        for bound, excess in self.constraints.violations(could_be).items():
            if excess > 0:
                return (
                    f"breaks {bound} whatever the {left} run(s) left give, and another trial does not"
                )
        if self.rivals.beat(self.losses(could_be)):
            return f"dominated whatever the {left} run(s) left give"
        return None

    def rungs(self, config: DefenceConfig, images: int) -> dict[int, float]:
        """Step -> share of all steps on so many images: where a trial is looked at within a victim."""
        if self.early_stopping is None or self.early_stopping.halving is None:
            return {}
        rounds = config.steps(images)
        found = {math.ceil(share * rounds): share for share in self.early_stopping.halving.shares}
        return {at: share for at, share in found.items() if at < rounds}

    def rung(self, run: Run, share: float, config: DefenceConfig) -> str:
        """The name of the place where a trial is looked at: trials meet there those of their own
        defence alone.

        At half of its steps one defence has only begun to unlearn and another has all but ended, so
        that their losses there say nothing of each other; and a step of one costs a hundred of
        another's.
        """
        place = rung(run.key, share)
        return f"{defence_of(config).name}/{place}" if self.several else place

    def out_of_time(self, *, spent: float, left: float) -> str | None:
        """Why a trial that needs `left` seconds more cannot end within the study's `trial_timeout`."""
        return projected_timeout(self.timeout, spent=spent, left=left)

    def at_rung(self, run: Run, share: float, values: Numbers, config: DefenceConfig) -> str | None:
        """Why a trial with these losses at a rung is stopped there, or None."""
        if self.rivals.ahead_at(self.rung(run, share, config), self.losses(values)):
            return f"behind at {share:g} of the rounds on {run.key}"
        return None
