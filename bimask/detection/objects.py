"""Pictures with boxes: what detectors are trained, attacked, repaired and scored on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from bimask.errors import DataError


class Target(TypedDict):
    """The objects of a picture, as torchvision's detectors take them.

    Attributes:
        boxes: (M, 4) float32, x0 y0 x1 y1 in pixels, x0 < x1 and y0 < y1.
        labels: (M,) int64 from 0.
    """

    boxes: Tensor
    labels: Tensor


class Found(Target):
    """The objects that a detector finds in a picture, the surest first.

    Attributes:
        scores: (M,) float in [0, 1].
    """

    scores: Tensor


@dataclass(frozen=True)
class DetectionData:
    """Pictures with their objects. The pictures may differ in size.

    Attributes:
        images: (3, H, W) uint8 each.
        targets: of each picture.
        classes: name of every class; labels are their places.
    """

    images: tuple[Tensor, ...]
    targets: tuple[Target, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.targets):
            raise DataError(
                f"{len(self.images)} pictures need as many targets, got {len(self.targets)}."
            )
        for image, target in zip(self.images, self.targets, strict=True):
            _check(image, target, len(self.classes))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def longest_side(self) -> int:
        """Pixels of the longest side of any picture; 0 where there is none."""
        return max((max(image.shape[1:]) for image in self.images), default=0)

    @property
    def labels(self) -> list[Target]:
        """What a defence learns from beside the pictures: their targets."""
        return list(self.targets)

    @property
    def digest(self) -> str:
        """Sixteen hex digits of pictures, boxes and labels, in their order."""
        content = hashlib.sha256(f"{len(self)}".encode())
        for image, target in zip(self.images, self.targets, strict=True):
            for tensor in (image, target["boxes"], target["labels"]):
                content.update(f"{tuple(tensor.shape)}".encode())
                content.update(tensor.cpu().contiguous().numpy().data)
        return content.hexdigest()[:16]

    def floats(self) -> list[Tensor]:
        """The pictures as float32 in [0, 1]."""
        return [image.float() / 255 for image in self.images]

    def subset(self, index: Sequence[int] | Tensor) -> DetectionData:
        """The pictures at these places, in their order."""
        rows = [int(row) for row in index]
        return DetectionData(
            tuple(self.images[row] for row in rows),
            tuple(self.targets[row] for row in rows),
            self.classes,
        )

    def to(self, device: torch.device | str) -> DetectionData:
        """The same on another device."""
        return DetectionData(
            tuple(image.to(device) for image in self.images),
            tuple(moved(target, device) for target in self.targets),
            self.classes,
        )

    def clean_subset(self, samples_per_class: int, *, seed: int) -> DetectionData:
        """`samples_per_class` pictures for each class, drawn by `seed`: a picture shows objects of
        several classes, so that their number is meant, not what they show.

        Raises:
            DataError: there are not so many.
        """
        if samples_per_class < 1:
            raise DataError(f"`samples_per_class >= 1` must hold, but got {samples_per_class}.")
        wanted = samples_per_class * self.num_classes
        if wanted > len(self):
            raise DataError(
                f"{samples_per_class} clean pictures for each of {self.num_classes} classes were asked "
                f"for, but there are {len(self)}; ask for at most {len(self) // self.num_classes}."
            )
        # a stream of its own, as for classifiers: equal seeds shall not hand out what was poisoned
        return self.subset(np.random.default_rng([seed, 1]).permutation(len(self))[:wanted].tolist())


@dataclass(frozen=True)
class DetectionSplits:
    """A data set: `train` for the victim and the defender, `val` to choose on, `test` to report on."""

    train: DetectionData
    val: DetectionData
    test: DetectionData


def moved(target: Target, device: torch.device | str) -> Target:
    """A target on another device."""
    return {"boxes": target["boxes"].to(device), "labels": target["labels"].to(device)}


def _check(image: Tensor, target: Target, classes: int) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        raise DataError(f"Pictures must be uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}.")
    boxes, labels = target["boxes"], target["labels"]
    if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        raise DataError(
            f"A target must have boxes (M, 4) and labels (M,), got {tuple(boxes.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if not bool((boxes[:, :2] < boxes[:, 2:]).all()):
        raise DataError("A box must be x0 y0 x1 y1 with x0 < x1 and y0 < y1, but one is empty.")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(f"Labels must lie in 0 to {classes - 1}, got {labels.unique().tolist()}.")
