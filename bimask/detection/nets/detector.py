"""One face for every detector: labels counted from 0, objects found, losses of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.ssd import SSD

from bimask.detection.objects import Found, Target
from bimask.errors import BimaskError, ModelError

ANSWER = "a list with a dict of `boxes` (M, 4), `labels` (M,) and `scores` (M,) for each picture"


class Detector(nn.Module):
    """A torchvision-style detector whose labels are places in a data set's classes.

    Such a net takes a list of pictures (3, H, W), float in [0, 1], of any sizes. In training it also
    takes targets and answers with a dict of losses; else it answers with boxes, labels and scores.

    Args:
        net: the user's own; it is wrapped, so its `state_dict` keeps its names.
        label_ids: the net's own label of each class; what it finds of other labels is left out.

    Attributes:
        net, label_ids: as given.

    Raises:
        ModelError: two classes with one label.
    """

    def __init__(self, net: nn.Module, label_ids: Sequence[int]) -> None:
        super().__init__()
        if len({*label_ids}) != len(label_ids) or min(label_ids, default=0) < 0:
            raise ModelError(
                f"Every class needs a label >= 0 of its own in the net, got {list(label_ids)}; mend "
                "`label_ids`."
            )
        self.net = net
        self.label_ids = tuple(label_ids)

    def forward(self, images: Sequence[Tensor]) -> list[Found]:
        """The objects found in each picture, the surest first.

        Batch norms and dropout act by their own mode; the rest of the net is asked as in evaluation.

        Args:
            images: (3, H, W) float in [0, 1] each.

        Raises:
            ModelError: the net raises, or answers with something else than objects.
        """
        with _asked_as(self.net, training=False):
            answer = self._ask(list(images))
        if not isinstance(answer, (list, tuple)) or len(answer) != len(images):
            raise ModelError(f"A detector must answer with {ANSWER}, but got {_kind(answer)}.")
        return [self._found(one) for one in answer]

    def losses(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """The net's own training losses by its own names, each a scalar; their sum is what it learns.

        Batch norms and dropout act by their own mode, so that frozen ones stay frozen.

        Args:
            images: (3, H, W) float in [0, 1] each.
            targets: of each picture; it may have no object.

        Raises:
            ModelError: the net raises, or answers with something else than losses.
        """
        ids = torch.tensor(self.label_ids)
        own = [
            {"boxes": target["boxes"], "labels": ids.to(target["labels"].device)[target["labels"]]}
            for target in targets
        ]
        with _asked_as(self.net, training=True):
            answer = self._ask(list(images), own)
        if isinstance(answer, dict) and answer and all(_is_scalar(v) for v in answer.values()):
            return {str(name): value for name, value in answer.items()}
        raise ModelError(
            "A detector in training must answer with a dict of losses, each a scalar tensor, but got "
            f"{_kind(answer)}."
        )

    def _ask(self, *given: Any) -> Any:
        try:
            return self.net(*given)
        except (BimaskError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a user's forward raises
            said = f"{type(error).__name__}: {shorten(str(error), 200)}"
            raise ModelError(
                f"The detector's forward fails on {len(given[0])} pictures ({said}); it must take a "
                "list of (3, H, W) floats in [0, 1], and targets in training, as torchvision's do."
            ) from error

    def _found(self, one: Any) -> Found:
        """One picture's answer in the classes' labels."""
        if not isinstance(one, dict) or not all(
            isinstance(one.get(key), Tensor) for key in ("boxes", "labels", "scores")
        ):
            raise ModelError(f"A detector must answer with {ANSWER}, but got {_kind(one)} in it.")
        boxes, labels, scores = one["boxes"], one["labels"], one["scores"]
        if boxes.shape != (len(labels), 4) or labels.ndim != 1 or scores.shape != labels.shape:
            raise ModelError(
                f"A detector must answer with {ANSWER}, but got {tuple(boxes.shape)}, "
                f"{tuple(labels.shape)} and {tuple(scores.shape)}."
            )
        ids = torch.tensor(self.label_ids, device=labels.device)
        same = labels[:, None] == ids
        order = scores.argsort(descending=True, stable=True)
        order = order[same.any(1)[order]]
        return {
            "boxes": boxes[order],
            "labels": same[order].long().argmax(1),
            "scores": scores[order],
        }


def label_ids_of(net: nn.Module, num_classes: int) -> list[int]:
    """What a net calls so many classes, as far as torchvision's families say it.

    Faster R-CNN and SSD keep label 0 for the background. FCOS and RetinaNet have none, but are often
    made as if they had, with one output more than there are classes and labels from 1.

    Raises:
        ModelError: another kind of net, or another number of outputs.
    """
    background = isinstance(net, (SSD, GeneralizedRCNN))
    if not background and not isinstance(net, (FCOS, RetinaNet)):
        raise ModelError(
            f"What a {type(net).__name__} calls the classes is not known, since it is none of "
            "torchvision's FCOS, RetinaNet, SSD and Faster R-CNN; say it by `label_ids`."
        )
    outputs = outputs_of(net)
    if outputs == num_classes + 1 or outputs is None:
        return list(range(1, num_classes + 1))
    if outputs == num_classes and not background:
        return list(range(num_classes))
    raise ModelError(
        f"The net has {outputs} outputs{', the background among them,' if background else ''} and the "
        f"data have {num_classes} classes; make it for them, or say by `label_ids` what it calls them."
    )


def outputs_of(net: nn.Module) -> int | None:
    """How many labels a net of torchvision's families has, a background's too; None if a part is
    exchanged that could say it."""
    for place in (
        "head.classification_head.num_classes",
        "head.classification_head.num_columns",
        "roi_heads.box_predictor.cls_score.out_features",
    ):
        found: Any = net
        for name in place.split("."):
            found = getattr(found, name, None)
        if isinstance(found, int):
            return found
    return None


@contextmanager
def _asked_as(net: nn.Module, *, training: bool) -> Iterator[None]:
    """Every module in this mode but norms and dropout, which keep theirs; then all as they were."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        for module, _ in modes:
            if not isinstance(module, (_NormBase, _DropoutNd)):
                module.training = training
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _kind(answer: object) -> str:
    if isinstance(answer, dict):
        return f"a dict of {', '.join(map(str, list(answer)[:4])) or 'nothing'}"
    if isinstance(answer, (list, tuple)):
        return f"a {type(answer).__name__} of {len(answer)}"
    return f"a {type(answer).__name__}"
