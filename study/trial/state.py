"""Where a trial stands while it runs, and who looks at it between its rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from bimask.defences.base import DefenceResult, StepLog
from bimask.defences.settings import DefenceConfig
from bimask.errors import NonFiniteError
from bimask.metrics import CleanScores, Scores
from bimask.tasks import defence_of
from study.spec.objectives import numbers_of
from study.trial.cases import Case, CaseResult
from study.trial.checkpoint import TrialCheckpoint
from study.trial.rules import TrialRules

Report = Callable[[int, str, StepLog, Scores | CleanScores], None]


@dataclass
class TrialState:
    """Where one trial stands.

    Attributes:
        position: in its group.
        cases: run -> result, of the runs that ended.
        rungs: place where it was looked at -> its losses there.
    """

    position: int
    config: DefenceConfig
    cases: dict[str, CaseResult] = field(default_factory=dict)
    rungs: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    failure: NonFiniteError | None = None
    stopped: str | None = None

    @property
    def running(self) -> bool:
        """Whether it has neither failed nor been stopped."""
        return self.failure is None and self.stopped is None

    @property
    def numbers(self) -> dict[str, dict[str, float]]:
        """Run -> its numbers, of the runs that ended."""
        return {key: case.numbers for key, case in self.cases.items()}


class TrialObserver:
    """Looks at a member's masks now and then: to report its scores, and to stop it at a rung.

    At every step it looks at the time: a trial that is far too slow for its limit ends early.
    """

    def __init__(
        self,
        case: Case,
        model: nn.Module,
        running: list[TrialState],
        rules: TrialRules,
        report_every: int,
        on_report: Report | None,
        runs: Sequence[int],
    ) -> None:
        """
        Args:
            runs: of victims, that each of `running` has.
        """
        self.case, self.model, self.running, self.rules = case, model, running, rules
        self.report_every, self.on_report = report_every, on_report
        self.rungs = [rules.rungs(trial.config, len(case.clean)) for trial in running]
        self.steps = [trial.config.steps(len(case.clean)) for trial in running]
        self.runs = runs
        self.first: dict[int, tuple[int, float]] = {}  # member -> its first step here, and when
        self.begun = time.perf_counter()
        self.kept: TrialCheckpoint | None = None

    def resume(self, kept: TrialCheckpoint) -> None:
        """Take over what the rungs said before the run was cut short, and keep what they say."""
        self.kept = kept
        for trial, (rungs, stopped) in zip(self.running, kept.rungs(), strict=False):
            trial.rungs |= rungs
            trial.stopped = stopped

    @property
    def seconds_each(self) -> float:
        """An even share of the time that the run has taken, also before it was cut short."""
        earlier = 0.0 if self.kept is None else self.kept.seconds
        return (time.perf_counter() - self.begun + earlier) / len(self.running)

    def __call__(self, member: int, log: StepLog, current: Callable[[], DefenceResult]) -> bool:
        """Whether the member ends here."""
        trial, done = self.running[member], log.step + 1
        due = self.on_report is not None and done % self.report_every == 0
        share = self.rungs[member].get(done)
        if self._out_of_time(member, done):
            return True
        if not due and share is None:
            return False
        scores = self.case.task.glance((result := current()).model(), self.case.val)
        if due and self.on_report is not None:
            self.on_report(trial.position, self.case.key, log, scores)
        if share is not None:
            said = self.case.ask(self.model, result)
            own = self.rules.numbers(result.numbers)
            numbers = numbers_of(self.case.task, scores, own, before=self.case.before, said=said)
            numbers["seconds"] = trial.seconds + self.seconds_each
            where = self.rules.rung(self.case, share, trial.config)
            trial.rungs[where] = self.rules.losses(numbers)
            trial.stopped = self.rules.at_rung(self.case, share, numbers, trial.config)
            self._keep()
        return trial.stopped is not None

    def _out_of_time(self, member: int, done: int) -> bool:
        """Whether the member is stopped since its projected end lies far beyond its limit.

        What comes before a run's first step is none of its pace, and comes again with every victim.
        """
        trial, steps, now = self.running[member], self.steps[member], self.seconds_each
        if defence_of(trial.config).ends_early:  # nobody knows how many steps are left
            return False
        begun, at = self.first.setdefault(member, (done, now))
        if done == begun:
            return False
        pace = (now - at) / (done - begun)
        others = self.runs[member] - len(trial.cases) - 1
        left = pace * (steps - done) + others * (max(0.0, at - begun * pace) + pace * steps)
        trial.stopped = self.rules.out_of_time(spent=trial.seconds + now, left=left)
        if trial.stopped is not None:
            self._keep()
        return trial.stopped is not None

    def _keep(self) -> None:
        if self.kept is not None:
            self.kept.keep_rungs([(one.rungs, one.stopped) for one in self.running])
