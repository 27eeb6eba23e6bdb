"""Which sampler copes with a space whose first parameter says which others exist."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.pages.markdown import NOTHING, listed, made, page, table
from benchmarks.records import RESULTS, read

KEPT = RESULTS / "conditional" / "synthetic.json"
AT = (24, 48, 96)  # trials
ABOUT = """A synthetic problem with eight defences of two to five settings each, two losses, and noise
(`benchmarks/conditional.py`). Every seed is another problem, and every search begins with one point of
each defence. A cell is the hypervolume after so many trials, the median over the seeds; *against
random* counts the seeds in which a sampler has more than random search after the most trials. *Grouped*
is `TPESampler(multivariate=True, group=True)`; *startup* is how many trials TPE draws at random."""


def conditional() -> str:
    """The page: one table."""
    kept = read(KEPT)
    if kept is None:
        return page("Samplers for several defences", NOTHING)
    parts = [ABOUT, made(kept["about"]), report(kept), conclusion(kept)]
    return page("Samplers for several defences", *parts)


def medians(kept: dict[str, Any]) -> dict[str, list[float]]:
    """Way -> the median hypervolume after each number of trials in `AT`."""
    return {
        way: [statistics.median(row[i] for row in seeds.values()) for i in range(len(AT))]
        for way, seeds in kept["ways"].items()
    }


def report(kept: dict[str, Any]) -> str:
    """The table, best first."""
    found, random = medians(kept), kept["ways"]["random"]
    rows = []
    for way in sorted(found, key=lambda way: -found[way][-1]):
        seeds = kept["ways"][way]
        better = sum(row[-1] > random[seed][-1] for seed, row in seeds.items())
        against = "-" if way == "random" else f"{better} of {len(seeds)}"
        rows.append([way, str(len(seeds)), *(f"{value:.4f}" for value in found[way]), against])
    return table(["sampler", "seeds", *(f"{count} trials" for count in AT), "against random"], rows)


def conclusion(kept: dict[str, Any]) -> str:
    """Which has the most, and what the others have against random search."""
    found = medians(kept)
    order = sorted(found, key=lambda way: -found[way][-1])
    gains = [f"{way} {found[way][-1] - found['random'][-1]:+.3f}" for way in order if way != "random"]
    return (
        f"After {AT[-1]} trials {order[0]} has the largest hypervolume by the median; against random "
        f"search the medians are {listed(gains)}."
    )
