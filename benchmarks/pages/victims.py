"""Every attack's victim beside the same training on clean labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.pages.markdown import NOTHING, listed, made, page, spread, table
from benchmarks.records import RESULTS, read

KEPT = RESULTS / "victims"
LEARNED = 0.9  # attack success of every seed from which on an attack counts as learned
ABOUT = """Each number is the mean of the seeds with the least and the most in brackets; ACC, ASR
and RA are in %, and seconds are the process's own, with preparation. The last epoch's weights are
scored. [A decision](../docs/decisions/0018-settings-of-small-victims.md) says why settings differ
from the published settings."""


def victims() -> str:
    """The page: one table a data set."""
    parts = [
        ABOUT,
    ]
    for path in sorted(KEPT.glob("*.json")):
        parts += section(path.stem, read(path))
    return page("Victims", *(parts if len(parts) > 1 else [NOTHING]))


def section(name: str, kept: dict[str, Any]) -> Iterable[str]:
    """The heading, what was scored, the table and its conclusion."""
    first = next(iter(next(iter(kept["victims"].values())).values()))
    val, test = first["scores"]["val"], first["scores"]["test"]
    yield f"## {name}"
    yield (
        f"There are {val['n']} val and {test['n']} test images, of which {val['n triggered']} and "
        f"{test['n triggered']} count for ASR and RA. {made(kept['about'])}"
    )
    columns = ["attack", "settings", "seeds", "ACC val", "ASR val", "RA val", "ACC", "ASR", "RA"]
    columns += ["ACC clean training", "pixels changed", "mean change, grey levels", "s"]
    yield table(columns, (_row(row, seeds, kept) for row, seeds in kept["victims"].items()))
    yield _conclusion(kept["victims"])


def _conclusion(rows: dict[str, Any]) -> str:
    weak = [
        f"{row.partition(',')[0]} ({next(iter(seeds.values()))['settings'] or 'as published'})"
        for row, seeds in rows.items()
        if any(one["scores"]["test"]["ASR"] < LEARNED for one in seeds.values())
    ]
    said = f"; the others are {listed(weak)}" if weak else ""
    return (
        f"{len(rows) - len(weak)} of {len(rows)} rows have an ASR of {100 * LEARNED:g} % or more on "
        f"test at every seed{said}."
    )


def _row(row: str, seeds: dict[str, Any], kept: dict[str, Any]) -> list[str]:
    found = list(seeds.values())
    scores = [
        spread([100 * one["scores"][split][score] for one in found])
        for split in ("val", "test")
        for score in ("ACC", "ASR", "RA")
    ]
    clean = [kept["clean"][one["recipe"]]["test"] for one in found]
    return [
        row.partition(",")[0],
        found[0]["settings"] or "as published",
        " ".join(seeds),
        *scores,
        spread([100 * accuracy for accuracy in clean]),
        spread([100 * one["changed pixels"] for one in found], 0) + " %",
        spread([one["mean change"] for one in found]),
        spread([one["seconds"] for one in found], 0),
    ]
