"""Backdoor attacks on detectors, under one contract (`DetectionAttack`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bimask.detection.attacks.base import DetectionAttack, PoisonedDetection
from bimask.detection.attacks.disappearance import ObjectDisappearance
from bimask.detection.attacks.misclassification import RegionMisclassification
from bimask.detection.attacks.penalty import Penalty, penalised

# an attack's settings by its `name`
AnyAttack = Annotated[RegionMisclassification | ObjectDisappearance, Field(discriminator="name")]

__all__ = [
    "AnyAttack",
    "DetectionAttack",
    "ObjectDisappearance",
    "Penalty",
    "PoisonedDetection",
    "RegionMisclassification",
    "penalised",
]
