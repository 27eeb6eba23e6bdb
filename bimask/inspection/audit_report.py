"""What an audit leaves: audit.json, audit.png, audit.html (one file, nothing fetched and no script)."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bimask.errors import printable
from bimask.files.drawn import save_figure
from bimask.files.pages import render_page
from bimask.inspection.audit import UNSEEN, Audit, calibration
from bimask.inspection.masked_evidence import MaskedEvidence
from bimask.inspection.suspect import Suspect

JSON, PICTURE, PAGE = "audit.json", "audit.png", "audit.html"
COLUMNS = 6  # clean images in the picture
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#767676"  # apart for a colour-blind reader


def write_report(
    folder: Path, audit: Audit, suspect: Suspect, masked: MaskedEvidence | None, facts: dict[str, Any]
) -> None:
    """Write the three files into `folder`, which exists.

    Args:
        masked: what purified model and inverse twin make of the triggers, if they were asked.
        facts: further provenance, as JSON types.
    """
    content = as_json(audit, suspect, masked) | facts
    (folder / JSON).write_text(json.dumps(content, indent=2) + "\n")
    figure = draw(audit, suspect)
    save_figure(figure, folder / PICTURE, dpi=110)
    (folder / PAGE).write_text(render(content, figure))


def as_json(audit: Audit, suspect: Suspect, masked: MaskedEvidence | None) -> dict[str, Any]:
    """The audit as JSON types, classes by name."""
    fitted = calibration()
    return {
        "verdict": audit.verdict,
        "reasons": list(audit.reasons),
        "unseen": UNSEEN,
        "probability": None if audit.verdict == "unknown" else audit.probability,
        "suspected_target": suspect.classes[audit.target],
        "classes": {
            name: {"score": float(audit.scores[k])}
            | {f"{kind}_price": float(values[k]) for kind, values in audit.prices.items()}
            | {f"{kind}_evidence": float(values[k]) for kind, values in audit.evidence.items()}
            | {f"{f}_success": float(found.success[k]) for f, found in audit.triggers.items()}
            for k, name in enumerate(suspect.classes)
        },
        "masked": None if masked is None else masked.as_json(),
        "calibration": {key: fitted[key] for key in ("fitted_on", "left_out", "domain", "band")},
        "clean_images": len(suspect.clean.images),
        "kind": asdict(audit.kind),
        "net": suspect.spec.net,
        "suspect": suspect.origin,
    }


def render(content: dict[str, Any], figure: Figure) -> str:
    """The page as HTML, the picture inside."""
    buffer = io.BytesIO()
    save_figure(figure, buffer, format="png", dpi=110)
    picture = Markup("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    return render_page("bimask.inspection", "audit.html", picture=picture, **content)


def draw(audit: Audit, suspect: Suspect) -> Figure:
    """The suspected class's triggers, the score of every class, and how reliable probabilities were."""
    figure = Figure(figsize=(11, 2.2 + 1.5 * (1 + len(audit.triggers))), layout="constrained")
    halves = figure.subfigures(2, height_ratios=[1 + len(audit.triggers), 1.6], squeeze=False)
    top, bottom = halves[:, 0]
    _triggers(top, audit, suspect)
    scores, curve = bottom.subplots(1, 2, width_ratios=[2, 1])
    _scores(scores, audit, suspect.classes)
    _reliability(curve, None if audit.verdict == "unknown" else audit.probability)
    return figure


def _triggers(figure: Any, audit: Audit, suspect: Suspect) -> None:
    images = suspect.clean.floats()
    shown = images[:: max(1, len(images) // COLUMNS)][:COLUMNS]
    rows: list[tuple[str, Tensor]] = [("clean", shown)]
    for family, found in audit.triggers.items():
        price = audit.prices[family][audit.target]
        success = found.success[audit.target]
        rows.append(
            (f"{family}\nprice {price:.2f}\n{success:.0%} follow", found.apply(shown)[audit.target])
        )
    grid = figure.subplots(len(rows), len(shown), squeeze=False)
    for axes, (text, row) in zip(grid, rows, strict=True):
        axes[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
        for place, image in zip(axes, row, strict=True):
            picture = image.permute(1, 2, 0) if len(image) == 3 else image.mean(0)
            place.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
    figure.suptitle(f"cheapest triggers towards {suspect.classes[audit.target]!r}", fontsize=10)


def _scores(axes: Axes, audit: Audit, classes: tuple[str, ...]) -> None:
    colours = [ORANGE if k == audit.target else BLUE for k in range(len(classes))]
    axes.bar(range(len(classes)), audit.scores, color=colours)
    axes.axhline(0, color=GREY, linewidth=0.8)
    few = len(classes) <= 20
    axes.set_xticks(range(len(classes)) if few else [audit.target])
    axes.set_xticklabels(
        [printable(c, 40) for c in (classes if few else [classes[audit.target]])], fontsize=8
    )
    axes.set_title("score of every class; orange is the suspected target", fontsize=10)


def _reliability(axes: Axes, probability: float | None) -> None:
    rows = calibration()["left_out"]["reliability"]
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
    axes.plot([r["predicted"] for r in rows], [r["observed"] for r in rows], marker="o", color=BLUE)
    for row in rows:
        axes.annotate(f"n {row['n']}", (row["predicted"], row["observed"]), fontsize=7)
    axes.set_xlabel("probability", fontsize=8)
    if probability is not None:
        axes.axvline(probability, color=ORANGE)
        axes.set_xlabel("probability (orange: this model)", fontsize=8)
    axes.set_ylabel("share backdoored", fontsize=8)
    axes.set_title("reliability, models left out", fontsize=10)
