"""What a detector finds in clean pictures and in the same ones under attack, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from bimask.detection.drawn import GAP, draw_objects, side_by_side
from bimask.detection.metrics import DetectionSets, detect
from bimask.errors import DataError

SHOWN = 3  # objects under attack


def found_in(model: nn.Module, sets: DetectionSets, classes: Sequence[str]) -> dict[str, Image.Image]:
    """What a detector finds, in rows of `SHOWN` pictures: "clean", and the same ones "triggered".

    Args:
        sets: of one split, on the model's device.
        classes: names.

    Raises:
        DataError: no object is under attack.
    """
    triggered = sets.triggered
    if triggered is None or not len(triggered):
        raise DataError("No object is under attack, so that nothing can be drawn.")
    spread = torch.linspace(0, len(triggered) - 1, min(SHOWN, len(triggered))).round().long().tolist()
    rows = {
        "clean": [sets.clean.images[int(triggered.picture[place])] for place in spread],
        "triggered": [triggered.images[place] for place in spread],
    }
    return {
        name: side_by_side(
            [
                draw_objects(image, found, classes)
                for image, found in zip(images, detect(model, images), strict=True)
            ]
        )
        for name, images in rows.items()
    }


def draw_victim(path: Path, model: nn.Module, sets: DetectionSets, classes: Sequence[str]) -> None:
    """A PNG of what a victim finds: clean pictures above, the same ones under attack below."""
    rows = [*found_in(model, sets, classes).values()]
    whole = Image.new("RGB", (rows[0].width, sum(row.height for row in rows) + GAP), "white")
    whole.paste(rows[0], (0, 0))
    whole.paste(rows[1], (0, rows[0].height + GAP))
    whole.save(path, format="PNG", optimize=True)
