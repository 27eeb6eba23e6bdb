"""What the profile `robust` leaves of the strangers' backdoors."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.pages.markdown import NOTHING, page, table
from benchmarks.records import RESULTS

KEPT = RESULTS / "zoo" / "strangers.jsonl"
TITLES = {"held": "Rows that no setting was tuned on", "tune": "Rows that settings were tuned on"}
REACHED = 0.05  # attack success of the oracle up to which masks could remove the backdoor
Record = dict[str, Any]
ABOUT = """Every row is purified with 10 clean images a class by `fast`, by `robust`, and by the
oracle, which is `robust` with the row's own trigger in place of the searched triggers: what masks
could do if the trigger were known, which no defender knows. `robust` is also run with 3 and 1
images a class."""


def kept() -> list[Record]:
    """What was measured so far."""
    return [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.is_file() else []


def zoo() -> str:
    """The page: one table a part."""
    records = kept()
    parts = [
        ABOUT,
        made(records),
    ]
    for part, title in TITLES.items():
        mine = [r for r in records if r["part"] == part]
        if mine:
            parts += [f"## {title}", section(mine), summary(mine)]
    failures = [
        [r["row"], r["method"], r["failure"].replace("|", "/")] for r in records if "failure" in r
    ]
    if failures:
        parts += ["## Failures", table(["row", "method", "why"], failures)]
    return page("Strangers", *(parts if records else [NOTHING]))


def made(records: list[Record]) -> str:
    """One sentence on where the records are from."""
    commits = ", ".join(dict.fromkeys(r.get("commit", "unknown") for r in records))
    return f"{len(records)} records, one thread each, were measured at the commits {commits}."


def section(records: list[Record]) -> str:
    """The table of a part."""
    heads = ["row", "ACC", "ASR", "fast ACC", "fast ASR", "robust ACC", "robust ASR", "oracle ASR"]
    heads += ["robust ASR, 3 a class", "1 a class", "ACC, 3 a class", "1 a class", "s"]
    rows = []
    for row in names(records):
        robust, fast = of(records, row, "robust"), of(records, row, "fast")
        few = [of(records, row, "robust", count) for count in (3, 1)]
        rows.append(
            [row, shown(robust[:1], "acc_before"), shown(robust[:1], "asr_before")]
            + [shown(fast, "acc"), shown(fast, "asr"), shown(robust, "acc"), shown(robust, "asr")]
            + [shown(of(records, row, "oracle"), "asr")]
            + [shown(one, "asr") for one in few]
            + [shown(one, "acc") for one in few]
            + [f"{mean(robust, 'seconds') or 0:.0f}"]
        )
    return table(heads, rows)


def summary(records: list[Record]) -> str:
    """One sentence of conclusion on a part."""
    robust = {row: of(records, row, "robust") for row in names(records)}
    asr = {row: value for row in robust if (value := mean(robust[row], "asr")) is not None}
    lost = [r["acc_before"] - r["acc"] for row in asr for r in robust[row]]
    clean = [r["acc_before"] - r["acc"] for row in robust if row not in asr for r in robust[row]]
    within = {
        row: value
        for row, value in asr.items()
        if (best := mean(of(records, row, "oracle"), "asr")) is not None and best <= REACHED
    }
    if not asr or not within:
        return NOTHING
    worst = max(within, key=within.__getitem__)
    twins = f"clean models lose {100 * statistics.fmean(clean):.1f}" if clean else "no clean model"
    return (
        f"Over {len(asr)} backdoored rows the mean attack success is "
        f"{100 * statistics.fmean(asr.values()):.1f} % "
        f"({100 * statistics.fmean(within.values()):.1f} % over the {len(within)} whose oracle reaches "
        f"{100 * REACHED:.0f} %, at worst {100 * within[worst]:.1f} %, {worst}); they lose "
        f"{100 * statistics.fmean(lost):.1f} points of accuracy on average, {twins}."
    )


def names(records: Iterable[Record]) -> list[str]:
    """The rows, in the order in which they were measured."""
    return list(dict.fromkeys(r["row"] for r in records))


def of(records: list[Record], row: str, method: str, per_class: int = 10) -> list[Record]:
    """The records of a row by one method."""
    wanted = (row, method, per_class)
    return [r for r in records if (r["row"], r["method"], r["per_class"]) == wanted and "acc" in r]


def mean(records: list[Record], key: str) -> float | None:
    """Mean of a score; None where there is none."""
    values = [r[key] for r in records if key in r]
    return statistics.fmean(values) if values else None


def shown(records: list[Record], key: str) -> str:
    """Mean of a score in per cent, with the least and the most."""
    values = [100 * r[key] for r in records if key in r]
    if not values:
        return "-"
    ends = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{ends}"
