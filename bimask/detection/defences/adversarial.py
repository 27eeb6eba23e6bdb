"""Adversarial fine-tuning of a detector on its whole loss: what the soft branch is compared with.

    generation      max over d   L_det(x + d, targets)
    repair          min over w   L_det(x) + weight * L_det(x + d)

L_det is the sum of the detector's own training losses, those of boxes and of the background included
(the simplest form of Zhang, Wang, "Towards Adversarially Robust Object Detection", ICCV 2019, arXiv
1907.10310). Of hundreds of predictions nearly all are background, so that objects weigh little.

Use it as a baseline. It costs what the soft branch costs. It needs boxes and labels, and no other thing
of the detector than its losses and their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bimask.detection.defences.base import Pictures, loss_of
from bimask.detection.defences.perturbed import Objective
from bimask.detection.defences.repair import Repair, RepairConfig
from bimask.detection.nets.detector import Detector


class AdversarialConfig(RepairConfig):
    """The settings of adversarial fine-tuning on the whole loss."""


class Adversarial(Repair[AdversarialConfig]):
    """Adversarial fine-tuning on the whole loss."""

    name = "adversarial"
    config = AdversarialConfig

    def objective(self, detector: Detector, batch: Pictures, config: AdversarialConfig) -> Objective:
        def lowered(images: Sequence[Tensor]) -> Tensor:
            return -loss_of(detector.losses(images, batch.labels))

        return lowered

    def terms(
        self, detector: Detector, batch: Pictures, config: AdversarialConfig
    ) -> dict[str, Tensor]:
        losses = detector.losses(batch.images, batch.labels)
        return {f"perturbed_{name}": loss for name, loss in losses.items()}
