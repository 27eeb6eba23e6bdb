"""Average precision as COCO's evaluation computes it (Lin et al., ECCV 2014; pycocotools' COCOeval).

Of a class and a threshold t of the intersection over union, detections are taken in the order of their
scores, the surest first. Each is given the object of its picture and class, free until then, that it
overlaps most, if that is by t at least; one without an object is false. Precision at a recall is the
best at that recall or a higher one; the average is over the recalls 0, 0.01, ..., 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torchvision.ops import box_iou

from bimask.detection.objects import Found, Target
from bimask.errors import DataError

THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # detections of one class in one picture, the surest

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class AveragePrecision:
    """Means over the classes that have an object at all; NaN where none has.

    Attributes:
        map50: mAP@50, in [0, 1].
        map: mAP@[.5:.95], in [0, 1], the mean over the thresholds 0.5, 0.55, ..., 0.95.
        by_class: label -> AP@50 of each class that has an object.
    """

    map50: float
    map: float
    by_class: dict[int, float]


def average_precision(found: Sequence[Found], targets: Sequence[Target]) -> AveragePrecision:
    """What detections are worth, picture by picture.

    Args:
        found: of each picture, in any order.
        targets: what is there, picture by picture.

    Raises:
        DataError: not as many of one as of the other.
    """
    if len(found) != len(targets):
        raise DataError(
            f"Detections are to be compared with the objects of {len(targets)} pictures, but those of "
            f"{len(found)} were given."
        )
    labels = sorted({int(label) for target in targets for label in target["labels"]})
    rows = {label: _of_class(label, found, targets) for label in labels}
    if not rows:
        return AveragePrecision(float("nan"), float("nan"), {})
    table = np.stack(list(rows.values()))
    by_class = {label: float(row[0]) for label, row in rows.items()}
    return AveragePrecision(float(table[:, 0].mean()), float(table.mean()), by_class)


def _of_class(label: int, found: Sequence[Found], targets: Sequence[Target]) -> Floats:
    """AP of one class, at every threshold: (T,)."""
    scores, hits, objects = [], [], 0
    for seen, target in zip(found, targets, strict=True):
        true_boxes = target["boxes"][target["labels"] == label]
        mine = seen["labels"] == label
        order = np.argsort(-seen["scores"][mine].double().cpu().numpy(), kind="stable")[:MOST]
        boxes = seen["boxes"][mine][order.tolist()]
        scores.append(seen["scores"][mine].double().cpu().numpy()[order])
        overlaps = box_iou(boxes.double(), true_boxes.to(boxes.device).double()).cpu().numpy()
        hits.append(_hits(overlaps))
        objects += len(true_boxes)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    right = np.concatenate(hits, axis=1)[:, order]
    return np.array([_area(row, objects) for row in right])


def _hits(overlaps: Floats) -> Flags:
    """Which detections get an object, at every threshold: (T, D).

    Args:
        overlaps: (D, G), of each detection, the surest first, with each object.
    """
    hits = np.zeros((len(THRESHOLDS), len(overlaps)), bool)
    if overlaps.shape[1] == 0:
        return hits
    for place, threshold in enumerate(THRESHOLDS):
        free = np.ones(overlaps.shape[1], bool)
        for row, overlap in enumerate(overlaps):
            open_ = np.where(free, overlap, -1.0)
            best = len(open_) - 1 - int(open_[::-1].argmax())  # of equals the last, as COCO's
            if open_[best] >= min(threshold, 1 - 1e-10):
                free[best], hits[place, row] = False, True
    return hits


def _area(right: Flags, objects: int) -> float:
    """The mean over the recalls of the best precision at a recall or above it.

    Args:
        right: (D,), whether each detection is, the surest first.
    """
    true = np.cumsum(right)
    precision = true / np.arange(1, len(right) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(true / objects, RECALLS, side="left")
    return float(np.append(best, 0.0)[places].mean())
