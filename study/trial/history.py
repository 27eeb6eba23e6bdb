"""Which trials are stopped early: by numbers of other trials that were known when a trial began.

Two rules. Between victims a trial ends once the best that it could still become is dominated by a
finished trial: nothing of the front can be lost. Within a victim, at given shares of a trial's rounds,
successive halving by non-domination rank: it goes on only while its scores there are among the first
1 / `reduction` of all that were seen there, counted in whole ranks (the stopping variant of ASHA, Li et
al. 2020, ranked as in Schmucker et al. 2021, arXiv 2106.12639). That is a bet, and only points that
others dominate are ever stopped by it.

What a trial is held against travels with it, as data: its end follows from its own record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from study.analysis.pareto import Floats, dominated, non_dominated, ranks
from study.spec.stopping import EarlyStopping
from study.store.schema import Bounds

Rows = list[list[float]]  # of losses, one column an objective


def rung(victim: str, share: float) -> str:
    """The name of the place where a trial is looked at."""
    return f"{victim}@{share:g}"


def line_to_beat(values: Floats, reduction: float) -> Floats:
    """The rows that a newcomer must not be dominated by, to be among the first 1 / `reduction`.

    The non-domination rank at which the better ranks and it hold that share of all, the newcomer
    included: what none of that rank dominates has that rank or a better one.
    """
    found = ranks(values)
    wanted = math.ceil((len(values) + 1) / reduction)
    counts = np.cumsum(np.bincount(found))
    return values[found == np.searchsorted(counts, wanted)]  # none where all of them go on


@dataclass(frozen=True)
class StoppingBounds:
    """What a trial is held against; plain lists, as Ray carries them.

    Attributes:
        front: losses of the finished feasible trials that no other dominates.
        lines: rung -> the losses to beat there.
    """

    front: Rows = field(default_factory=list)
    lines: dict[str, Rows] = field(default_factory=dict)

    def sent(self) -> Bounds:
        """As it goes into a trial's configuration."""
        return {"front": self.front, "lines": self.lines}

    @classmethod
    def of(cls, sent: Bounds | None) -> StoppingBounds:
        """From what was sent; none where nothing was."""
        return cls() if sent is None else cls(sent["front"], sent["lines"])

    def beat(self, losses: Sequence[float]) -> bool:
        """Whether a finished trial dominates these losses."""
        return bool(self.front) and dominated(np.array(losses), np.array(self.front))

    def ahead_at(self, where: str, losses: Sequence[float]) -> bool:
        """Whether too many were better at this rung."""
        line = self.lines.get(where)
        return bool(line) and dominated(np.array(losses), np.array(line))


class ParetoHistory:
    """What the finished trials and the rungs hold so far, kept where the search is."""

    def __init__(self, rules: EarlyStopping | None) -> None:
        self.rules = rules
        self.front: Rows = []
        self.seen: dict[str, Rows] = {}

    def finished(self, losses: Sequence[float], violations: Mapping[str, float]) -> None:
        """A trial has ended with these objectives."""
        if all(value <= 0 for value in violations.values()):
            rows = [*self.front, list(losses)]
            self.front = [
                row for row, kept in zip(rows, non_dominated(np.array(rows)), strict=True) if kept
            ]

    def passed(self, where: str, losses: Sequence[float]) -> None:
        """A trial was seen at a rung."""
        self.seen.setdefault(where, []).append(list(losses))

    def rivals(self) -> StoppingBounds:
        """What a trial that begins now is held against."""
        if self.rules is None:
            return StoppingBounds()
        lines = {}
        if (halving := self.rules.halving) is not None:
            for where, rows in self.seen.items():
                if len(rows) >= halving.grace:
                    lines[where] = line_to_beat(np.array(rows), halving.reduction).tolist()
        return StoppingBounds(self.front if self.rules.dominated else [], lines)
