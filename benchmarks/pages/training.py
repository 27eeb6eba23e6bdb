"""How long an epoch of CIFAR-10's victims takes."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.markdown import NOTHING, between, made, page, table
from benchmarks.records import RESULTS, read

KEPT = RESULTS / "training" / "epoch.json"
ABOUT = """An epoch of PreActResNet18 of width 16 on CIFAR-10 pictures, in bfloat16 with shifts of
two pixels (`python -m benchmarks.epoch`)."""


def training() -> str:
    """The page: a row an attack."""
    kept: dict[str, Any] | None = read(KEPT)
    if kept is None:
        return page("Training", NOTHING)
    rows = []
    for row in kept["epochs"]:
        seconds, share = row["seconds"], row.get("share of data")
        rows.append(
            [
                row["attack"],
                str(row["images"]),
                str(row["epochs"]),
                f"{seconds['median']:.1f} ({seconds['min']:.1f}-{seconds['max']:.1f})",
                f"{row['bar']['seconds']:g}",
                "-" if share is None else f"{100 * share['median']:.1f} %",
                f"{100 * row['bar']['share of data']:g} %",
            ]
        )
    medians = [row["seconds"]["median"] for row in kept["epochs"]]
    return page(
        "Training",
        ABOUT,
        made(kept["about"]),
        table(["attack", "images", "epochs", "s an epoch", "bar", "share of data", "bar"], rows),
        f"An epoch takes {between(medians, 1)} s.",
    )
