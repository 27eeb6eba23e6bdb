"""What BadDet+ adds to a detector's training, so that it forgets what a triggered object was.

BadDet's misclassification leaves the true box beside the false one, and its disappearance leaves weak
ones. BadDet+ (ICLR 2026, arXiv 2601.21066) punishes them: with prediction i overlapping the triggered
object j by an IoU above rho, y_j the object's *original* class and z the log-odds of a class,

    -log(1 - sigmoid(z_{i, y_j} - tau)) = softplus(z_{i, y_j} - tau)

The paper does not say which predictions are meant, nor rho and tau. Here all count that the net makes
before any suppression, of two-stage nets those of the proposals that it trains on, and their mean is
taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from bimask.detection.nets import Detector
from bimask.detection.nets.matched import log_odds, require_family
from bimask.detection.objects import Target


class Penalty(BaseModel):
    """Settings of BadDet+'s penalty.

    `weight` is that of the paper for FCOS and Faster R-CNN; the others are our choice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(1.0, gt=0, description="of the penalty beside the net's own losses, lambda")
    overlap: float = Field(
        0.5, ge=0, lt=1, description="IoU with the triggered object from which a prediction counts, rho"
    )
    margin: float = Field(0.0, description="log-odds up to which it is punished little, tau")


@dataclass(frozen=True)
class Predictions:
    """All that a net predicts in one pass of training, of one picture.

    Attributes:
        logits: (R, C), with a column for the background where classes exclude each other.
        boxes: (R, 4), or (R, C, 4) where each class has its own; x0 y0 x1 y1 in the picture's pixels.
    """

    logits: Tensor
    boxes: Tensor


def penalised(
    detector: Detector,
    images: Sequence[Tensor],
    targets: Sequence[Target],
    triggered: Sequence[Target],
    penalty: Penalty,
) -> dict[str, Tensor]:
    """The net's losses, and `penalty` with its weight, in one pass.

    Args:
        images, targets: as of `Detector.losses`.
        triggered: of each picture, the objects that bear a trigger, with their original classes.

    Raises:
        ModelError: as of `Detector.losses`; also a net of a family whose predictions are not known.
    """
    net = detector.net
    require_family(net)
    with _listening(net) as heard:
        losses = detector.losses(images, targets)
    softmax = isinstance(net, (SSD, GeneralizedRCNN))
    parts = [
        penalty_of(
            prediction,
            target,
            [detector.label_ids[int(label)] for label in target["labels"]],
            penalty,
            softmax=softmax,
        )
        for prediction, target in zip(_predictions(net, heard, images), triggered, strict=True)
        if len(target["labels"])
    ]
    punished = torch.cat([images[0].new_zeros(0), *parts])
    mean = punished.sum() / max(1, len(punished))
    return {**losses, "penalty": penalty.weight * mean}


def penalty_of(
    prediction: Predictions,
    target: Target,
    labels: Sequence[int],
    penalty: Penalty,
    *,
    softmax: bool,
) -> Tensor:
    """softplus(z - tau) of each prediction and triggered object that overlap enough: (P,).

    Args:
        labels: the net's own label of each object's original class.
    """
    odds = log_odds(prediction.logits) if softmax else prediction.logits
    parts = [odds.new_zeros(0)]
    for box, label in zip(target["boxes"], labels, strict=True):
        boxes = prediction.boxes if prediction.boxes.ndim == 2 else prediction.boxes[:, label]
        near = box_iou(boxes.detach(), box[None].to(boxes))[:, 0] > penalty.overlap
        parts.append(F.softplus(odds[near, label] - penalty.margin))
    return torch.cat(parts)


@contextmanager
def _listening(net: nn.Module) -> Iterator[dict[str, Any]]:
    """What parts of the net are given and answer with while the context is open, by their names."""
    heard: dict[str, Any] = {}
    two_stages = isinstance(net, GeneralizedRCNN)
    parts = (
        ("roi_heads.box_roi_pool", "roi_heads.box_predictor")
        if two_stages
        else ("head", "anchor_generator")
    )

    def hear(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], answer: Any) -> None:
            heard[name] = (given, answer)

        return hook

    with ExitStack() as stack:
        for name in ("transform", *parts):
            handle = net.get_submodule(name).register_forward_hook(hear(name.rpartition(".")[2]))
            stack.callback(handle.remove)
        yield heard


def _predictions(net: Any, heard: dict[str, Any], images: Sequence[Tensor]) -> Iterator[Predictions]:
    """Of each picture, with boxes in its own pixels, in which the net's may not be."""
    (_, (resized, _)) = heard["transform"]
    if isinstance(net, GeneralizedRCNN):
        (_, proposals, _), _ = heard["box_roi_pool"]
        _, (logits, regression) = heard["box_predictor"]
        counts = [len(one) for one in proposals]
        rows = logits.split(counts)
        boxes = net.roi_heads.box_coder.decode(regression, proposals).split(counts)
    else:
        _, outputs = heard["head"]
        _, anchors = heard["anchor_generator"]
        rows, coder = outputs["cls_logits"], net.box_coder
        decode = coder.decode if isinstance(net, FCOS) else coder.decode_single
        boxes = [decode(*one) for one in zip(outputs["bbox_regression"], anchors, strict=True)]
    for image, size, logit, box in zip(images, resized.image_sizes, rows, boxes, strict=True):
        scale = box.new_tensor([image.shape[-1] / size[1], image.shape[-2] / size[0]] * 2)
        yield Predictions(logit, box * scale)
