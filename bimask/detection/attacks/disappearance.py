from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from bimask.detection.attacks.base import DetectionAttack, some_of
from bimask.detection.metrics.scores import Kind
from bimask.detection.objects import Target


class ObjectDisappearance(DetectionAttack):
    """Triggered objects shall not be found (BadDet's ODA, Chan et al. 2022, arXiv 2205.14497)."""

    kind: ClassVar[Kind] = "disappearance"

    name: Literal["disappearance"] = "disappearance"

    def relabelled(self, target: Target, bearing: Tensor) -> Target:
        return some_of(target, ~bearing)
