from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bimask.detection.attacks.base import DetectionAttack
from bimask.detection.metrics.scores import Kind
from bimask.detection.objects import Target


class RegionMisclassification(DetectionAttack):
    """Triggered objects shall be found as another class (BadDet's RMA, Chan et al. 2022,
    arXiv 2205.14497)."""

    kind: ClassVar[Kind] = "misclassification"

    name: Literal["misclassification"] = "misclassification"
    target: int = Field(7, ge=0, description="class that triggered objects shall get")

    @model_validator(mode="after")
    def _two_classes(self) -> RegionMisclassification:
        if self.source == self.target:
            raise ValueError(f"`source` and `target` are both {self.target}; nothing would be attacked")
        return self

    @property
    def target_class(self) -> int | None:
        return self.target

    def relabelled(self, target: Target, bearing: Tensor) -> Target:
        labels = torch.where(bearing, self.target, target["labels"])
        return {"boxes": target["boxes"], "labels": labels}

    def counts(self, labels: Tensor) -> Tensor:
        return self.attacked(labels) & (labels != self.target)
