"""Single trials up close: learning curves and masks from what they left in their folders."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from markupsafe import Markup
from torch import Tensor, nn

from bimask.defences.base import Defence
from bimask.files.tensors import load_tensors
from bimask.masking.masks import MaskSet
from study.spec.objectives import known_scores, number
from study.store.records import read_reports, read_rounds


class Curves(TypedDict):
    """Stages with their numbers of steps, each loss term by step, scores on `val` as (step, value)."""

    stages: list[tuple[str, int]]
    loss: list[float | None]
    terms: dict[str, list[float | None]]
    scores: dict[str, list[tuple[int, float]]]


class Layer(TypedDict):
    """A layer's channels, sorted by factor: factors a' and selections s as bytes in base64, how many
    are kept, and the means of both."""

    name: str
    factor: str
    selection: str
    kept: int
    mean: float
    shared: float


def stored(folder: Path, victim: str, defence: Defence[Any]) -> dict[str, Tensor] | None:
    """What a trial stored of a victim, or None where it left nothing."""
    path = folder / f"{victim}.{defence.stem}.safetensors"
    return load_tensors(path) if path.is_file() else None


def reports_of(folder: Path) -> dict[int, dict[str, dict[str, dict[int, float]]]]:
    """Scores on val while trials ran: number -> victim -> score -> round -> value."""
    found: dict[int, dict[str, dict[str, dict[int, float]]]] = {}
    for report in read_reports(folder):
        mine = found.setdefault(report["number"], {}).setdefault(report["victim"], {})
        for name, value in known_scores(report).items():
            # a trial that was gone on with reports some rounds again
            mine.setdefault(name, {})[report["step"]] = value
    return found


def curves(
    folder: Path, victim: str, reports: Mapping[str, Mapping[int, float]], final: Mapping[str, object]
) -> Curves | None:
    """Stages with their rounds, each loss term by round, scores on val by round.

    Args:
        folder: the trial's own.
        reports: score -> round -> value.
        final: the scores after the last round.
    """
    path = folder / f"{victim}.rounds.json"
    if not path.is_file():
        return None
    rounds = read_rounds(path)
    if not rounds:
        return None  # a defence without steps
    stages = [
        (name, len(list(logs)))
        for name, logs in itertools.groupby(r.get("stage", "steps") for r in rounds)
    ]
    terms = dict.fromkeys(name for log in rounds for name in log["losses"])
    return {
        "stages": stages,
        "loss": _short(log["loss"] for log in rounds),
        "terms": {name: _short(log["losses"].get(name) for log in rounds) for name in terms},
        "scores": {
            name: [*sorted(points.items()), (len(rounds), number(final, name))]
            for name, points in reports.items()
        },
    }


def layers(masks: MaskSet, model: nn.Module | None = None) -> list[Layer]:
    """Every layer's channels, in the order of `model`; files of masks are sorted by name."""
    masks = masks.requires_grad_(False)
    keeps, selections = masks.keeps(), masks.by_site(masks.selection)
    names = [name for name, _ in model.named_modules() if name in keeps] if model else list(keeps)
    rows: list[Layer] = []
    for site in names:
        keep = keeps[site]
        order = keep.argsort(descending=True)
        rows.append(
            {
                "name": site,
                "factor": _bytes(keep[order]),
                "selection": _bytes(selections[site][order]),
                "kept": int((keep >= 0.5).sum()),
                "mean": round(float(keep.mean()), 4),
                "shared": round(float(selections[site].mean()), 4),
            }
        )
    return rows


def _short(values: Iterator[float | None]) -> list[float | None]:
    """Four digits are more than a curve shows."""
    return [None if value is None else float(f"{value:.4g}") for value in values]


def _bytes(values: Tensor) -> Markup:
    """Numbers in [0, 1] as one byte each, base64."""
    quantised = (255 * values.clamp(0, 1)).round().to(torch.uint8)
    return Markup(base64.b64encode(quantised.cpu().numpy().tobytes()).decode())
