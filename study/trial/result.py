"""What a trial leaves, also one that was stopped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from study.spec.objectives import known_scores, mean_of
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
    spread: dict[str, dict[str, float]]
    rungs: dict[str, list[float]]
    seconds: float
    stopped: str | None = None

    @property
    def scores(self) -> dict[str, float]:
        """`SCORES` over all victims, as far as they are known."""
        return known_scores(self.values)

    def record(self) -> dict[str, Any]:
        """The numbers that go into a trial's record, as JSON types."""
        cases = self.cases.values()
        record = {
            **self.values,
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

    def per_victim(self) -> dict[str, dict[str, Any]]:
        """Victim -> its scores, numbers and evidence, the mean where it had several runs."""
        runs: dict[str, list[dict[str, Any]]] = {}
        for case in self.cases.values():
            runs.setdefault(case.name, []).append(case.everything())
        return {name: mean_of(mine) for name, mine in runs.items()}
