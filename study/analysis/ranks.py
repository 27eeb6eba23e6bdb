"""Are several methods different at all, and which of them: ranks over the same blocks.

Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 7 (2006): Friedman's
test, and where it rejects, Nemenyi's critical difference. Two methods whose mean ranks differ by less
than the critical difference are not told apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import friedmanchisquare, rankdata, studentized_range
from typing_extensions import TypedDict

ALPHA = 0.05


class Ranks(TypedDict):
    """What a test of ranks says.

    Attributes:
        mean_rank: by method; 1 is best.
        p: of Friedman's test; null for fewer than three methods or two blocks.
        critical_difference: of mean ranks, at `ALPHA` (Nemenyi); null likewise.
        cliques: maximal sets of methods that are not told apart, best first.
        blocks: how many there are.
    """

    mean_rank: dict[str, float]
    p: float | None
    critical_difference: float | None
    cliques: list[list[str]]
    blocks: int


def rank(scores: Mapping[str, Sequence[float]]) -> Ranks:
    """Rank methods over blocks.

    Args:
        scores: method -> its score on every block, in one order; higher is better. NaN is a failure,
            and ranks behind all others of its block.
    """
    names = list(scores)
    table = np.array([scores[name] for name in names], dtype=float)  # (methods, blocks)
    worst = np.where(np.isnan(table), -np.inf, table)
    ranks = np.apply_along_axis(lambda column: rankdata(-column), 0, worst)
    means = dict(zip(names, ranks.mean(1).tolist(), strict=True))
    k, n = table.shape
    p = difference = None
    if k >= 3 and n >= 2:
        tied = bool((ranks == ranks[0]).all())  # on all blocks: the statistic is 0 / 0
        p = 1.0 if tied else float(friedmanchisquare(*ranks).pvalue)
        difference = critical_difference(k, n)
    order = sorted(names, key=lambda name: means[name])
    return {
        "mean_rank": {name: means[name] for name in order},
        "p": p,
        "critical_difference": difference,
        "cliques": _cliques(order, means, difference, told_apart=p is not None and p < ALPHA),
        "blocks": n,
    }


def critical_difference(methods: int, blocks: int) -> float:
    """Nemenyi's: q sqrt(k (k + 1) / (6 N)), q the studentised range's quantile over sqrt 2."""
    q = float(studentized_range.ppf(1 - ALPHA, methods, np.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * blocks))


def _cliques(
    order: list[str], means: Mapping[str, float], difference: float | None, *, told_apart: bool
) -> list[list[str]]:
    if difference is None or not told_apart:
        return [order]
    found: list[list[str]] = []
    for first, name in enumerate(order):
        clique = [other for other in order[first:] if means[other] - means[name] <= difference]
        if not found or clique[-1] != found[-1][-1]:
            found.append(clique)
    return found
