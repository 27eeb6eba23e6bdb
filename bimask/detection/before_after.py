"""What a repair did to a detector, as far as annotated clean pictures show it.

Nobody knows the trigger of a detector in doubt, so nothing here is an attack success rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from bimask.detection.defences.risk import AdversarialRisk
from bimask.detection.metrics.average_precision import AveragePrecision, average_precision
from bimask.detection.metrics.scores import OVERLAP, SCORE, detect
from bimask.detection.nets.detector import Detector
from bimask.detection.objects import DetectionData, Found
from bimask.errors import SettingError

LEAST_MAP50 = 0.05  # of a suspect that knows its classes
LEAST_PLACES = 0.1  # of one that knows where objects are, whatever it calls them
FEWEST = 3  # objects of a class that are found, to say what it is called
MOST_LABELS = 2000  # of a net; LVIS has 1203
LONGEST = 20  # labels in a sentence


@dataclass(frozen=True)
class Look:
    """What suspect and repaired detector find in the same clean pictures.

    Attributes:
        data: the pictures and what is in them.
        before, after: of each picture.
    """

    data: DetectionData
    before: Sequence[Found]
    after: Sequence[Found]

    @cached_property
    def precision(self) -> dict[str, AveragePrecision]:
        """Average precision of "before" and "after"."""
        both = {"before": self.before, "after": self.after}
        return {name: average_precision(found, self.data.targets) for name, found in both.items()}

    @property
    def same(self) -> bool:
        """Whether both find the same, to the bit."""
        return all(
            one[key].shape == other[key].shape and torch.equal(one[key], other[key])
            for one, other in zip(self.before, self.after, strict=True)
            for key in ("boxes", "labels", "scores")
        )

    def as_json(self) -> dict[str, Any]:
        """For a manifest: counts, and of each detector its mAP and the AP@50 of every class."""
        names = self.data.classes
        return {
            "pictures": len(self.data),
            "objects": sum(len(target["labels"]) for target in self.data.targets),
        } | {
            name: {
                "map50": found.map50,
                "map": found.map,
                "ap50": {names[label]: value for label, value in found.by_class.items()},
            }
            for name, found in self.precision.items()
        }


def look(suspect: nn.Module, repaired: nn.Module, data: DetectionData) -> Look:
    """Ask both detectors; pictures and models on one device.

    Args:
        suspect, repaired: as `Detector`.
        data: at least one object in it.
    """
    return Look(data, detect(suspect, data.images), detect(repaired, data.images))


def risk_of(risk: AdversarialRisk, repaired: nn.Module) -> dict[str, Any]:
    """Held-out risk of a repaired detector, for a manifest, with what it is the mean of."""
    shares = {one.branch: one.share(repaired) for one in risk.weak}
    return {
        "risk": risk(repaired),
        "branches": {
            one.branch: {
                "objects": len(one),
                "share": None if math.isnan(shares[one.branch]) else shares[one.branch],
            }
            for one in risk.weak
        },
    }


def require_knowing(suspect: Detector, data: DetectionData) -> str:
    """Refuse a detector that finds next to nothing of what is there, or calls it otherwise: it was
    described wrongly.

    Returns:
        A sentence on classes that it mostly calls otherwise, where it calls others right; else empty.

    Raises:
        SettingError: its mAP@50 is below `LEAST_MAP50`, or it calls most of the objects that it finds
            otherwise than the annotations.
    """
    anything = Detector(suspect.net, range(MOST_LABELS)).eval()
    seen = detect(anything, data.images)
    places = average_precision(*map(_without_classes, (seen, data.targets))).map50
    own = [_called_so(found, suspect.label_ids) for found in seen]
    precision = average_precision(own, data.targets).map50
    counts = _called(seen, data)
    right = counts[torch.arange(len(counts)), list(suspect.label_ids)]
    if places >= LEAST_PLACES and 2 * int(right.sum()) < int(counts.sum()):
        mostly = counts.argmax(1).tolist()
        looks = ""
        if bool(counts.any(1).all()) and len({*mostly}) == len(mostly) <= LONGEST:
            looks = f"; it looks like --label-ids {','.join(map(str, mostly))}"
        raise SettingError(
            f"The detector finds objects of {len(data)} clean pictures where they are (mAP@50 "
            f"{places:.3f} whatever it calls them), but calls {int(counts.sum() - right.sum())} of "
            f"{int(counts.sum())} otherwise than the annotations; give what it calls the classes, in "
            f"their order, as --label-ids{looks}."
        )
    if precision < LEAST_MAP50:
        raise SettingError(
            f"The detector finds next to nothing of what the annotations say, an mAP@50 of "
            f"{precision:.3f} on {len(data)} clean pictures; look at the net, the weights and "
            "--image-size: are they of these objects?"
        )
    odd = (counts.sum(1) >= FEWEST) & (2 * right < counts.sum(1))
    if not bool(odd.any()):
        return ""
    names = ", ".join(
        f"{name} (label {label})"
        for name, label, is_odd in zip(data.classes, counts.argmax(1).tolist(), odd, strict=True)
        if is_odd
    )
    return f"The detector mostly calls these classes otherwise: {names}; does --label-ids say it right?"


def _without_classes(rows: Sequence[Any]) -> list[Any]:
    return [{**row, "labels": torch.zeros_like(row["labels"])} for row in rows]


def _called_so(found: Found, label_ids: Sequence[int]) -> Found:
    """The objects of a net's own labels as those of the classes, others left out."""
    same = found["labels"][:, None] == torch.tensor(label_ids, device=found["labels"].device)
    known = same.any(1)
    return {
        "boxes": found["boxes"][known],
        "labels": same[known].long().argmax(1),
        "scores": found["scores"][known],
    }


def _called(seen: Sequence[Found], data: DetectionData) -> Tensor:
    """How many objects of each class a net gives each of its labels, the surest at its place:
    (K, labels)."""
    counts = torch.zeros(data.num_classes, MOST_LABELS, dtype=torch.int64)
    for found, target in zip(seen, data.targets, strict=True):
        sure = found["scores"] >= SCORE
        near = box_iou(target["boxes"], found["boxes"][sure]) >= OVERLAP
        for row in near.any(1).nonzero().flatten().tolist():  # the first is the surest
            first = int(near[row].nonzero()[0])
            counts[int(target["labels"][row]), int(found["labels"][sure][first])] += 1
    return counts
