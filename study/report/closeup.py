"""Single trials up close: learning curves and masks from what they left in their folders."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bimask.config import PurifyConfig
from bimask.masks import MaskSet
from study.records import HISTORY


def saved_masks(folder: Path, victim: str, settings: PurifyConfig) -> MaskSet | None:
    """A trial's masks for a victim, or None where it left none."""
    path = folder / f"{victim}.masks.safetensors"
    if not path.is_file():
        return None
    return MaskSet.from_tensors(
        load_file(path), sharpness=settings.sharpness, straight_through=settings.straight_through
    )


def curves(folder: Path, victim: str) -> dict[str, Any] | None:
    """Stages with their rounds, each loss term by round, scores on val by rounds done."""
    path = folder / f"{victim}.rounds.json"
    if not path.is_file():
        return None
    rounds = json.loads(path.read_text())
    stages = [(name, len(list(logs))) for name, logs in itertools.groupby(r["stage"] for r in rounds)]
    terms = dict.fromkeys(name for log in rounds for name in log["losses"])
    return {
        "stages": stages,
        "loss": _short(log["loss"] for log in rounds),
        "terms": {name: _short(log["losses"].get(name) for log in rounds) for name in terms},
        "scores": _history(folder, victim),
    }


def layers(masks: MaskSet, model: nn.Module | None = None) -> list[dict[str, Any]]:
    """Every layer's channels, sorted by factor: factor a' and selection s, in 255ths, as base64.

    In the order of `model`; files of masks are sorted by name.
    """
    masks = masks.requires_grad_(False)
    keeps, selections = masks.keeps(), masks.by_site(masks.selection)
    names = [name for name, _ in model.named_modules() if name in keeps] if model else list(keeps)
    rows = []
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


def _history(folder: Path, victim: str) -> dict[str, list[tuple[int, float]]]:
    path = folder / HISTORY
    if not path.is_file():
        return {}
    known: Mapping[str, list[tuple[int, float]]] = json.loads(path.read_text())
    start = f"{victim}/"
    return {key.removeprefix(start): pairs for key, pairs in known.items() if key.startswith(start)}


def _short(values: Iterator[float | None]) -> list[float | None]:
    """Four digits are more than a curve shows."""
    return [None if value is None else float(f"{value:.4g}") for value in values]


def _bytes(values: Tensor) -> str:
    """Numbers in [0, 1] as one byte each, base64."""
    quantised = (255 * values.clamp(0, 1)).round().to(torch.uint8)
    return base64.b64encode(quantised.cpu().numpy().tobytes()).decode()
