"""The page of a protocol: one file, nothing fetched and no script."""

from __future__ import annotations

from bimask.files.pages import render_page
from study.analysis.protocol import AXES, Over, Protocolled, Row
from study.report.comparison import percent
from study.spec.objectives import Spread

SHOWN = {
    "clean_accuracy": "ACC",
    "attack_success": "ASR",
    "recovery": "RA",
    "arr": "ARR",
    "rdr": "RDR",
    "der": "DER",
    "accuracy_drop": "points lost",
}
TITLES = {"dataset": "By data set", "net": "By net", "attack": "By attack", "rate": "By poisoning rate"}


def render(found: Protocolled) -> str:
    """The page as HTML."""
    return render_page(
        "study.report",
        "protocol.html",
        found=found,
        verdict=verdict(found),
        headings=list(SHOWN.values()),
        over=[
            (title, [(one["value"], *_line(one)) for one in found["over"] if one["axis"] == axis])
            for axis, title in (
                ("all", "All cases"),
                *((axis, TITLES[axis]) for axis in AXES),
                ("clean", "Twins that were never poisoned"),
            )
        ],
        rows=[
            (_case(row), _before(row), *_line(row), row["n"], row["n_failed"]) for row in found["rows"]
        ],
    )


def verdict(found: Protocolled) -> list[str]:
    """How much of the protocol there is, and the means of every entry over the cases."""
    told = [f"{found['judged']} of {found['cases']} cases are judged."]
    for one in found["over"]:
        if one["axis"] == "all" and "attack_success" in one["scores"]:
            scores = one["scores"]
            told.append(
                f"{one['entry']}: over {one['cases']} cases ASR {percent(scores['attack_success'])}, "
                f"RA {percent(scores.get('recovery'))}, {percent(scores['accuracy_drop'])} points lost."
            )
    if found["unlearned"]:
        told.append(
            f"No victim of {len(found['unlearned'])} cases obeys its trigger, and no mean counts these."
        )
    return told


def _line(one: Over | Row) -> tuple[str, list[str]]:
    scores: dict[str, Spread] = one["scores"]
    return one["entry"], [percent(scores.get(name)) for name in SHOWN]


def _case(row: Row) -> str:
    rate = "clean" if row["rate"] is None else f"{row['attack']}, {100 * row['rate']:g} %"
    return f"{row['dataset']}, {row['net']}, {rate}"


def _before(row: Row) -> str:
    shown = [percent(row["before"].get(name)) for name in ("clean_accuracy", "attack_success")]
    return " / ".join(shown)
