"""What a detector is worth: clean precision, attack success, and what becomes of objects under the
trigger.

An object is found when the detector reports its class in its place: intersection over union of 0.5 at
least, score of `SCORE` at least. One object of an otherwise clean picture bears the trigger, and is
asked about ("BadDet+", ICLR 2026, arXiv 2601.21066); every object that counts has a picture of its own.
Of N such objects

    true detection    TDR@50   the original class is found
    disappeared                no class is found
    misclassified              another class is found, and the original is not
    attack success    ASR@50   misclassification: the attack's target class is found;
                               disappearance: the original class is not found

The first three add up to 1. Success of a misclassification may stand beside a true detection, so that
success alone misleads; success of a disappearance counts objects under another class, too, so that
`disappeared` stands beside it.

Small detectors miss many objects without any trigger. Shares that end in `_conditional` count the
objects alone that the suspect finds when clean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from bimask.detection.metrics.average_precision import average_precision
from bimask.detection.objects import DetectionData, Found
from bimask.errors import DataError
from bimask.metrics.scores import Split

SCORE = 0.3  # from here on a detection counts as found; what detectors' own demos draw
OVERLAP = 0.5
PASS = 32  # pictures
FATES = ("attack_success", "true_detection", "disappeared", "misclassified")

Kind = Literal["misclassification", "disappearance"]


@dataclass(frozen=True)
class TriggeredObjects:
    """Pictures of which one object each bears a trigger.

    Attributes:
        images: (3, H, W) uint8 each.
        boxes: (N, 4), of the object that bears it.
        labels: (N,) int64, its original class.
        picture: (N,) int64, the clean picture's place in the data.
    """

    images: tuple[Tensor, ...]
    boxes: Tensor
    labels: Tensor
    picture: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> TriggeredObjects:
        """The same on another device."""
        return TriggeredObjects(
            tuple(image.to(device) for image in self.images),
            self.boxes.to(device),
            self.labels.to(device),
            self.picture.to(device),
        )


@dataclass(frozen=True)
class DetectionSets:
    """Clean pictures and objects under attack of one split, made once, evaluated often.

    Attributes:
        clean: pictures with their objects.
        triggered: what is asked under attack; None of a detector whose trigger nobody knows.
        kind: what the attack wants.
        target: its class; None of a disappearance.
        found_clean: (N,) bool, objects that the suspect finds when clean, see `with_suspect`.
    """

    clean: DetectionData
    triggered: TriggeredObjects | None
    split: Split
    kind: Kind = "misclassification"
    target: int | None = None
    found_clean: Tensor | None = None

    def with_suspect(self, suspect: nn.Module) -> DetectionSets:
        """The same sets that know which objects the suspect finds when clean: conditional shares of
        whatever is made of it count these."""
        if self.triggered is None:
            return self
        return replace(self, found_clean=self.hits(detect(suspect, self.clean.images)))

    def hits(self, clean: Sequence[Found]) -> Tensor:
        """Which objects under attack are found when clean, by what is found in the clean pictures:
        (N,) bool."""
        asked = self.triggered
        assert asked is not None
        found = [
            int(label) in classes_at(clean[place], box)
            for place, box, label in zip(asked.picture.tolist(), asked.boxes, asked.labels, strict=True)
        ]
        return torch.tensor(found, dtype=torch.bool)

    def to(self, device: torch.device | str) -> DetectionSets:
        """The same on another device."""
        moved = None if self.triggered is None else self.triggered.to(device)
        return replace(self, clean=self.clean.to(device), triggered=moved)


@dataclass(frozen=True)
class DetectionScores:
    """Scores of one detector on one split, in [0, 1]; NaN where no object is behind one.

    Attributes:
        map50, map: mAP@50 and mAP@[.5:.95] of the clean pictures.
        attack_success: ASR@50 of the victim's own attack.
        true_detection: TDR@50.
        disappeared, misclassified: what became of the other objects.
        n_clean, n_objects: clean pictures, and objects under attack.
        n_conditional: objects under attack that the suspect finds when clean.
        split: "val" to choose on, "test" to report.
    """

    map50: float
    map: float
    attack_success: float
    true_detection: float
    disappeared: float
    misclassified: float
    attack_success_conditional: float
    true_detection_conditional: float
    disappeared_conditional: float
    misclassified_conditional: float
    n_clean: int
    n_objects: int
    n_conditional: int
    split: Split


def evaluate(model: nn.Module, sets: DetectionSets) -> DetectionScores:
    """Score a detector on one split; pictures and model on one device. Sets that know no suspect take
    the model for it.

    Args:
        model: list of (3, H, W) in [0, 1] -> list of `Found`, as `Detector` in eval mode.

    Raises:
        DataError: an empty set, whose scores would be undefined.
    """
    triggered = sets.triggered
    if not len(sets.clean) or (triggered is not None and not len(triggered)):
        raise DataError(
            f"Scores need clean pictures and objects under attack, got {len(sets.clean)} and "
            f"{0 if triggered is None else len(triggered)} in split {sets.split!r}."
        )
    clean = detect(model, sets.clean.images)
    precision = average_precision(clean, sets.clean.targets)
    fates = torch.zeros(0, len(FATES), dtype=torch.bool)
    conditional = torch.zeros(0, dtype=torch.bool)
    if triggered is not None:
        found = detect(model, triggered.images)
        fates = torch.tensor(
            [
                _fate(classes_at(seen, box), int(label), sets.target, sets.kind)
                for seen, box, label in zip(found, triggered.boxes, triggered.labels, strict=True)
            ]
        )
        conditional = sets.hits(clean) if sets.found_clean is None else sets.found_clean
    return DetectionScores(
        map50=precision.map50,
        map=precision.map,
        **_shares(fates),
        **_shares(fates[conditional], "_conditional"),
        n_clean=len(sets.clean),
        n_objects=len(fates),
        n_conditional=int(conditional.sum()),
        split=sets.split,
    )


@torch.no_grad()
def detect(model: nn.Module, images: Sequence[Tensor]) -> list[Found]:
    """What a detector finds in uint8 pictures, in eval mode; the mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        found: list[Found] = []
        for start in range(0, len(images), PASS):
            found += model([image.float() / 255 for image in images[start : start + PASS]])
        return found
    finally:
        for module, training in modes.items():
            module.training = training


def classes_at(found: Found, box: Tensor) -> set[int]:
    """The classes that are found at a box (4,)."""
    sure = found["scores"] >= SCORE
    near = box_iou(found["boxes"][sure], box[None].to(found["boxes"])).squeeze(1) >= OVERLAP
    return {int(label) for label in found["labels"][sure][near]}


def _fate(
    classes: set[int], label: int, target: int | None, kind: Kind
) -> tuple[bool, bool, bool, bool]:
    """Whether the attack succeeds, the original class is found, none is, another alone is."""
    true = label in classes
    success = not true if kind == "disappearance" else target in classes
    return success, true, not classes, bool(classes) and not true


def _shares(fates: Tensor, suffix: str = "") -> dict[str, Any]:
    """The share of each column of fates (N, 4), by its name."""
    shares = fates.double().mean(0).tolist() if len(fates) else [math.nan] * len(FATES)
    return {name + suffix: share for name, share in zip(FATES, shares, strict=True)}
