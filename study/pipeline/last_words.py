"""The front so far in words, for a study that is ended so that it can say nothing itself."""

from __future__ import annotations

from collections.abc import Sequence

from study import search
from study.analysis.pareto import ParetoFront, feasible_first
from study.spec.config import StudyConfig
from study.spec.objectives import known_scores, quantities, total_violation
from study.store.schema import TrialRecord

LINES = 20  # of the front


class FrontSoFar:
    """The front of the trials that have ended, kept as text while they end.

    Args:
        name: what --resume takes.
        begun: whether there is something to go on with.
        again: the words of the command that goes on; none are `--resume NAME`.

    Attributes:
        text: a title and one line a trial; empty before the first is complete.
    """

    def __init__(self, name: str, *, begun: bool, again: Sequence[str] = ()) -> None:
        self.name, self.begun, self.text = name, begun, ""
        self.again = " ".join(again) or f"--resume {name}"

    def tell(self, *, begun: bool = False) -> None:
        """Leave it to who speaks where this process is killed (`own_ray.set_last_words`)."""
        self.begun = self.begun or begun
        how = f"go on with {self.again}" if self.begun else "launch it again"
        search.set_last_words(
            f"{self.text}{self.name} was ended without a word: it was killed, or Ray died; {how}."
        )

    def set(self, config: StudyConfig, trials: list[TrialRecord]) -> None:
        """What the trials come to."""
        self.text = front_in_lines(config, trials)
        self.tell()


def front_in_lines(config: StudyConfig, trials: list[TrialRecord]) -> str:
    """The Pareto front of records: a title, and a line a trial with its scores on val."""
    complete = sorted((t for t in trials if t["status"] == "COMPLETE"), key=lambda t: t["number"])
    points = [quantities(trial) for trial in complete]
    violations = [total_violation(config.constraints.violations(point)) for point in points]
    competing = feasible_first(violations)
    front = ParetoFront.of([points[at] for at in competing], config.directions)
    lines = []
    for trial in [complete[competing[at]] for at in front.indices][:LINES]:
        scores = {**known_scores(trial), "risk": trial.get("risk")}
        shown = [f"{config.task.short(k)} {v:.3f}" for k, v in scores.items() if v is not None]
        lines.append(f"  trial {trial['number']}: {', '.join(shown)}\n")
    if not lines:
        return ""
    return f"Pareto front of {config.name} so far (val), of {len(trials)} trials:\n{''.join(lines)}"
