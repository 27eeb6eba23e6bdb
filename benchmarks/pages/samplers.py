"""How soon a sampler has the hypervolume that random search ends with."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np

from benchmarks.pages.markdown import NOTHING, listed, made, page, table
from benchmarks.records import HERE, RESULTS, read
from study.analysis.pareto import ParetoFront
from study.spec.config import StudyConfig
from study.spec.reading import load_config

KEPT = RESULTS / "samplers"
SPACE = HERE.parent / "search_spaces" / "ims_digits.yaml"
ROUNDING = 1e-12
# trials of a random search, in records that do not say it themselves
TRIALS = {"digits-badnets": 20, "digits-badnets-pool60": 40, "digits-blended": 40}
ABOUT = """Digits, nets of width 8, one run a trial, the space of `search_spaces/ims_digits.yaml`
without its first points. A share is the seconds until a sampler has the hypervolume that random
search ends with, over all seconds of that random search, suggestions included. Random searches are
drawn from one pool of measured trials, a permutation a seed. *Shipped start* also begins with the
study's own first points, which random search is not given."""


def samplers() -> str:
    """The page: one table a file."""
    parts = [
        ABOUT,
    ]
    config = load_config(SPACE)
    for path in sorted(KEPT.glob("*.json"), key=lambda path: path.stem):
        kept = read(path)
        about = kept["about"]
        trials = about["trials"] if "trials" in about else TRIALS[path.stem]
        parts += [
            f"## {path.stem}",
            f"Random searches are of {trials} trials from a pool of {len(kept['pool'])}. {made(about)}",
            report(kept, config, trials),
            conclusion(kept, config, trials),
        ]
    return page("Samplers", *parts) if len(parts) > 1 else page("Samplers", NOTHING)


def curve(config: StudyConfig, rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(seconds, hypervolume) after each trial."""
    points, found, spent = [], [], 0.0
    for row in rows:
        spent += row["seconds"]
        if row["status"] == "COMPLETE":
            points.append(row)
        volume = ParetoFront.of(points, config.directions).hypervolume(config.reference)
        found.append((spent, volume))
    return found


def share_until(mine: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """Seconds until `mine` has the last volume of `other`, over all its seconds; infinite for never."""
    goal, spent = other[-1][1], other[-1][0]
    return next((seconds / spent for seconds, volume in mine if volume >= goal - ROUNDING), math.inf)


def random_search(
    config: StudyConfig, pool: list[dict[str, Any]], seed: int, trials: int
) -> list[tuple[float, float]]:
    """(seconds, hypervolume) after each trial of a random search: trials of the pool."""
    order = np.random.default_rng(seed).permutation(len(pool))[:trials]
    return curve(config, [pool[i] for i in order])


def shares_of(
    kept: dict[str, Any], config: StudyConfig, trials: int, way: str
) -> tuple[list[float], list[float]]:
    """Of every seed of a way: its share, and the hypervolume of its random search."""
    shares, volumes = [], []
    for seed, mine in kept["ways"][way].items():
        random = random_search(config, kept["pool"], int(seed), trials)
        shares.append(share_until(curve(config, mine), random))
        volumes.append(random[-1][1])
    return shares, volumes


def report(kept: dict[str, Any], config: StudyConfig, trials: int) -> str:
    """The table: every way against random search of `trials` trials."""
    rows = []
    for way, seeds in kept["ways"].items():
        shares, volumes = shares_of(kept, config, trials, way)
        stopped = [
            sum(row["status"] == "PRUNED" for row in mine) / len(mine) for mine in seeds.values()
        ]
        rows.append(
            [
                way,
                str(len(shares)),
                _shown(statistics.median(shares)),
                ", ".join(_shown(share) for share in shares),
                f"{statistics.median(volumes):.4f}",
                f"{100 * statistics.mean(stopped):.0f} %",
            ]
        )
    columns = ["sampler", "seeds", "share of random's seconds, median", "each seed"]
    columns += ["random's hypervolume", "trials stopped"]
    return table(columns, rows)


def conclusion(kept: dict[str, Any], config: StudyConfig, trials: int) -> str:
    """One sentence on the medians."""
    told = []
    for way in kept["ways"]:
        middle = statistics.median(shares_of(kept, config, trials, way)[0])
        after = "never" if math.isinf(middle) else f"after {middle:.2f} of random's seconds"
        told.append(f"{way.replace(', early stopping', '')} {after}")
    return f"By the median of the seeds, random search's end is reached by {listed(told)}."


def _shown(share: float) -> str:
    return "never" if math.isinf(share) else f"{share:.2f}"
