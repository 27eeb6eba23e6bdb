"""What a trial leaves, also one that was stopped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from study.spec.objectives import Spread, known_scores, mean_of
from study.store.schema import MemberReport, Outcome, VictimScores
from study.trial.cases import CaseResult


@dataclass(frozen=True)
class TrialResult:
    """Everything that a trial leaves, also one that was stopped.

    Attributes:
        cases: run -> result, of the runs that ended.
        values: objective -> value over all victims; empty for a stopped trial.
        spread: objective -> its spread over the repeats; empty for a single one.
        rungs: place where the trial was looked at -> its losses there.
        seconds: of the trial; where several ran at once, an even share of their wall time.
        stopped: why the trial was stopped early, or None.
    """

    cases: dict[str, CaseResult]
    values: dict[str, float]
    spread: dict[str, Spread]
    rungs: dict[str, list[float]]
    seconds: float
    stopped: str | None = None

    @property
    def scores(self) -> dict[str, float]:
        """`SCORES` over all victims, as far as they are known."""
        return known_scores(self.values)

    def report(self, number: int, device: str) -> MemberReport:
        """What the driver is told of trial `number`."""
        return cast(MemberReport, {"number": number, "device": device} | self.outcome())

    def outcome(self) -> Outcome:
        """The numbers that go into a trial's record, as JSON types."""
        cases = self.cases.values()
        record = cast(Outcome, dict(self.values))
        record |= {
            "scores": self.per_victim(),
            "passes": {
                "forward": sum(case.result.passes.forward for case in cases),
                "backward": sum(case.result.passes.backward for case in cases),
            },
            "rounds": sum(len(case.result.history) for case in cases),
            "seconds": self.seconds,
        }
        if self.rungs:
            record["rungs"] = self.rungs
        if self.stopped is not None:
            record["stopped"] = self.stopped
        if self.spread:
            record["spread"] = self.spread
            record["runs"] = {key: case.everything() for key, case in self.cases.items()}
        return record

    def per_victim(self) -> dict[str, VictimScores]:
        """Victim -> its scores, numbers and evidence, the mean where it had several runs."""
        runs: dict[str, list[VictimScores]] = {}
        for case in self.cases.values():
            runs.setdefault(case.name, []).append(case.everything())
        return {name: cast(VictimScores, mean_of(mine)) for name, mine in runs.items()}
