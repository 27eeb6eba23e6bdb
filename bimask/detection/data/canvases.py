"""Digits on textured canvases: a data set for detectors that is made, not downloaded, in seconds."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from bimask.attacks.base import as_bytes
from bimask.data import ImageData, load_data
from bimask.detection.objects import DetectionData, DetectionSplits, Target

SIDE = 96  # pixels of a canvas
SMALLEST, LARGEST = 20, 28  # pixels that a digit's 8x8 are enlarged to
MOST_DIGITS = 3  # on a canvas
MOST_OVERLAP = 0.05  # IoU of two boxes
INK = 0.25  # opacity from which a pixel is a digit's
TRIES = 100  # to place a digit beside the others
COARSE = 6  # cells a side of the texture
COUNTS = (2000, 300, 400)  # canvases to train, to choose, to report on


@lru_cache(maxsize=1)
def digit_canvases() -> DetectionSplits:
    """2,000 canvases to train on, 300 to choose on and 400 to report on, always the same.

    The splits show digits of the splits of the data set `digits`, so no digit is in two of them.
    """
    digits = load_data("digits", image_size=8)
    parts = [
        canvases(part, count, generator=torch.Generator().manual_seed(seed))
        for seed, (part, count) in enumerate(
            zip((digits.train, digits.val, digits.test), COUNTS, strict=True)
        )
    ]
    return DetectionSplits(*parts)


def canvases(digits: ImageData, count: int, *, generator: torch.Generator) -> DetectionData:
    """Canvases of 96x96 pixels with one to three digits each, light on a darker texture.

    A texture is a gradient and noise of low frequency in slightly differing colours. A digit is
    enlarged to 20 to 28 pixels; its box is tight around its ink. Boxes overlap by an IoU below 0.05.

    Args:
        digits: (N, 1, 8, 8) to draw from.
        generator: of the CPU.
    """
    images, targets = [], []
    for _ in range(count):
        canvas = _texture(generator)
        boxes, labels = torch.empty(0, 4), []
        wanted = int(torch.randint(1, MOST_DIGITS + 1, (), generator=generator))
        for row in torch.randint(len(digits), (wanted,), generator=generator).tolist():
            box = _paste(canvas, digits.images[row], boxes, generator)
            if box is not None:
                boxes = torch.cat([boxes, box])
                labels.append(int(digits.labels[row]))
        images.append(as_bytes(canvas))
        targets.append(Target(boxes=boxes, labels=torch.tensor(labels, dtype=torch.int64)))
    return DetectionData(tuple(images), tuple(targets), digits.classes)


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # doubles: what differs between machines in the last bit is no byte of a picture
    return low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=generator)


def _texture(generator: torch.Generator) -> Tensor:
    """(3, 96, 96) float64 in [0, 1]."""
    noise = _uniform(-1, 1, (1, COARSE, COARSE), generator)
    noise = noise + _uniform(-0.3, 0.3, (3, COARSE, COARSE), generator)
    noise = F.interpolate(noise[None], (SIDE, SIDE), mode="bilinear", align_corners=True)[0]
    along = torch.linspace(-1, 1, SIDE, dtype=torch.float64)
    slope = _uniform(-0.1, 0.1, (2, 1), generator)
    gradient = slope[0] * along + slope[1] * along[:, None]
    level, contrast = _uniform(0.2, 0.4, (1,), generator), _uniform(0.03, 0.12, (1,), generator)
    return (level + gradient + contrast * noise).clamp(0, 1)


def _paste(canvas: Tensor, digit: Tensor, boxes: Tensor, generator: torch.Generator) -> Tensor | None:
    """Put a digit on a canvas, in place, where it overlaps none of `boxes`: its own (1, 4), None if
    there is no such place among those tried."""
    side = int(torch.randint(SMALLEST, LARGEST + 1, (), generator=generator))
    ink = F.interpolate(digit[None].double() / 255, (side, side), mode="bilinear", align_corners=True)[
        0
    ]
    colour = _uniform(0.7, 1.0, (1, 1, 1), generator) + _uniform(-0.1, 0.1, (3, 1, 1), generator)
    rows, columns = ((ink[0] >= INK).any(axis).nonzero() for axis in (1, 0))
    tight = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], 1).float()
    for _ in range(TRIES):
        x, y = torch.randint(SIDE - side + 1, (2,), generator=generator).tolist()
        box = tight + torch.tensor([x, y, x, y])
        if not (box_iou(box, boxes) >= MOST_OVERLAP).any():
            place = canvas[:, y : y + side, x : x + side]
            place.copy_((place * (1 - ink) + colour * ink).clamp(0, 1))
            return box
    return None
