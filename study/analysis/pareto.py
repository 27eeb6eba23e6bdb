"""Dominance, the Pareto front, hypervolume and the choice of one point: numpy only.

Conventions: inside, every objective is a loss (lower is better); directions are turned in one place,
`losses`. A point dominates another if it is no worse anywhere and better somewhere, so equal points
stand on the front together, as in Optuna. NaN is refused, never ranked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from study.spec.directions import OBJECTIVES, Direction

Floats = NDArray[np.float64]


def losses(points: Sequence[Mapping[str, float]], objectives: Mapping[str, Direction]) -> Floats:
    """Points as rows of losses (N, M), one column an objective, signs turned so that low is good.

    Raises:
        ValueError: a value that is NaN or infinite.
    """
    sign = np.array([-1.0 if d == "maximize" else 1.0 for d in objectives.values()])
    values = np.array([[float(p[name]) for name in objectives] for p in points], dtype=np.float64)
    values = values.reshape(len(points), len(objectives))
    if not np.isfinite(values).all():
        raise ValueError("A Pareto front needs finite values; leave failed trials out.")
    return values * sign


def non_dominated(values: Floats) -> NDArray[np.bool_]:
    """Which rows of losses (N, M) no other row dominates: (N,) booleans."""
    no_worse = (values[:, None] <= values[None]).all(2)
    better = (values[:, None] < values[None]).any(2)
    return np.logical_not(np.any(no_worse & better, axis=0))


def ranks(values: Floats) -> NDArray[np.int64]:
    """Non-domination rank of every row of losses (N, M): 0 on the front, 1 on that of the rest, ..."""
    found = np.full(len(values), -1, dtype=np.int64)
    rank = 0
    while (left := np.flatnonzero(found < 0)).size:
        found[left[non_dominated(values[left])]] = rank
        rank += 1
    return found


def dominated(point: Floats, values: Floats) -> bool:
    """Whether any row of losses (N, M) dominates `point` (M,)."""
    return bool(((values <= point).all(1) & (values < point).any(1)).any()) if len(values) else False


def feasible_first(violations: Sequence[float]) -> list[int]:
    """Positions that compete: the feasible ones, or where there are none, the nearest to feasible.

    Args:
        violations: 0 for a feasible point, else how far it is from feasible (Deb 2000).
    """
    least = min(violations, default=0.0)
    return [i for i, violation in enumerate(violations) if violation <= max(least, 0.0)]


def hypervolume(values: Floats, reference: Floats) -> float:
    """Volume that rows of losses (N, M) dominate, bounded by `reference` (M,); 0 for none.

    Rows that do not beat the reference everywhere add nothing. Sliced along the last objective, one
    slab a distinct value: O(N^2) for two objectives, exact for any number.
    """
    values = values[(values < reference).all(1)]
    if not len(values):
        return 0.0
    if values.shape[1] == 1:
        return float(reference[0] - values.min())
    values = values[np.argsort(values[:, -1], kind="stable")]
    tops = np.append(values[1:, -1], reference[-1])
    return float(
        sum(
            (top - row[-1]) * hypervolume(values[: i + 1, :-1], reference[:-1])
            for i, (row, top) in enumerate(zip(values, tops, strict=True))
            if top > row[-1]
        )
    )


@dataclass(frozen=True)
class ParetoFront:
    """The non-dominated points among some.

    Attributes:
        points: all points, objective -> value and whatever else they carry.
        objectives: objective -> direction.
        indices: positions in `points` of those on the front, best first objective first.
    """

    points: Sequence[Mapping[str, float]]
    objectives: Mapping[str, Direction]
    indices: tuple[int, ...]

    @classmethod
    def of(
        cls,
        points: Sequence[Mapping[str, float]],
        objectives: Mapping[str, Direction] = OBJECTIVES,
    ) -> ParetoFront:
        """The front of `points`; a ValueError for NaN."""
        values = losses(points, objectives)
        on_front: list[int] = np.flatnonzero(non_dominated(values)).tolist() if len(values) else []
        order = sorted(on_front, key=lambda i: (*values[i], i))
        return cls(points, objectives, tuple(order))

    def hypervolume(self, reference: Mapping[str, float]) -> float:
        """Dominated volume against a reference point that the study fixes, never the data."""
        return hypervolume(
            losses(self.points, self.objectives), losses([reference], self.objectives)[0]
        )


def choose(
    points: Sequence[Mapping[str, float]],
    *,
    min_clean_accuracy: float,
    violations: Sequence[float] | None = None,
    by: Literal["attack_success", "risk"] = "attack_success",
    tolerance: float = 0.0,
    quality: str = "clean_accuracy",
) -> int | None:
    """Position of the point with least attack success among the feasible that are accurate enough.

    Ties go to the higher clean accuracy, then to the earlier point; None if there is no such point. The
    choice is always on the front of (clean accuracy, attack success) of the feasible points.

    Args:
        quality: what stands in the place of clean accuracy, `Task.quality`.
        by: what is to be least; "risk" needs no knowledge of the attack.
        violations: 0 for a feasible point, see `feasible_first`; None where nothing is bounded.
        tolerance: what lies so little above the least counts as equal to it, and the most accurate of
            those is chosen: differences of one image in a hundred decide nothing.
    """
    left = [
        i
        for i, p in enumerate(points)
        if p[quality] >= min_clean_accuracy - 1e-12 and (violations is None or violations[i] <= 0)
    ]
    if not left:
        return None
    least = min(points[i][by] for i in left)
    as_good = [i for i in left if points[i][by] <= least + tolerance + 1e-12]
    if not tolerance:
        return min(as_good, key=lambda i: (points[i][by], -points[i][quality], i))
    return min(as_good, key=lambda i: (-points[i][quality], points[i][by], i))
