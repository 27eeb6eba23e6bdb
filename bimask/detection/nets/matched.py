"""What a detector says of the objects that it is taught: predictions matched to targets.

A detector answers at hundreds of places, and nearly all of them are background. Which of them stand
for an object is for its own assigner to say, the one that it was trained with: centre sampling of FCOS,
overlap with anchors of RetinaNet and SSD, sampled proposals of Faster R-CNN. The net is asked for its
training losses, and what its own code hands to the last of them is listened to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.ssd import SSD
from torchvision.ops import sigmoid_focal_loss

from bimask.detection.nets.detector import Detector
from bimask.detection.objects import Target
from bimask.errors import ModelError


@dataclass(frozen=True)
class Answers:
    """All that a net's classification loss is computed from, in its own terms.

    Attributes:
        logits: (R, C), with a column for the background where `softmax`.
        picture: (R,) int64.
        object: (R,) int64, the place in the picture's target; below 0 where it is background, or
            ignored.
        softmax: whether classes exclude each other; else each is a sigmoid of its own.
        losses: the net's training losses by its own names.
    """

    logits: Tensor
    picture: Tensor
    object: Tensor
    softmax: bool
    losses: dict[str, Tensor]


@dataclass(frozen=True)
class Matched:
    """Predictions that stand for an object; M of them, of K classes.

    Attributes:
        logits: (M, K) log-odds of each class for itself, log p - log(1 - p); their gradients reach the
            pictures and the weights.
        labels: (M,) int64, of the objects.
        picture: (M,) int64, which of the pictures.
        object: (M,) int64, which of the picture's objects.
        loss: the net's own kind of classification loss (focal loss, cross-entropy), the mean over
            these; 0 where there is none.
        losses: all of the net's training losses, of the same pass.
    """

    logits: Tensor
    labels: Tensor
    picture: Tensor
    object: Tensor
    loss: Tensor
    losses: dict[str, Tensor]


def matched(detector: Detector, images: Sequence[Tensor], targets: Sequence[Target]) -> Matched:
    """Ask a detector about the objects of pictures, in one pass.

    Args:
        images: (3, H, W) float in [0, 1] each.
        targets: of each picture; it may have no object.

    Raises:
        ModelError: a detector of a family whose assigner is not known, or that fails.
    """
    answers = ask(detector, images, targets)
    mine = answers.object >= 0
    picture, place = answers.picture[mine], answers.object[mine]
    rows = answers.logits[mine]
    firsts = torch.tensor([0, *(len(target["labels"]) for target in targets)]).cumsum(0)
    labels = torch.cat([target["labels"] for target in targets])[firsts.to(picture)[picture] + place]
    ids = torch.tensor(detector.label_ids, device=rows.device)
    return Matched(
        logits=(log_odds(rows) if answers.softmax else rows)[:, ids],
        labels=labels,
        picture=picture,
        object=place,
        loss=classification_loss(rows, ids[labels], softmax=answers.softmax) / max(1, len(rows)),
        losses=answers.losses,
    )


def ask(detector: Detector, images: Sequence[Tensor], targets: Sequence[Target]) -> Answers:
    """Ask for the training losses, and listen. Arguments and errors as of `matched`."""
    net: Any = detector.net
    require_family(net)
    softmax = isinstance(net, (SSD, GeneralizedRCNN))
    if isinstance(net, (FCOS, RetinaNet, SSD)):
        owner = net if isinstance(net, SSD) else net.head
        with _calls(owner, "compute_loss") as calls:
            losses = detector.losses(images, targets)
        (call,) = _heard(calls, net)
        _targets, outputs, _anchors, places = call.given
        logits = list(outputs["cls_logits"])
    else:
        heads = net.roi_heads
        with (
            _calls(heads, "select_training_samples") as sampled,
            _calls(heads.box_predictor, "forward") as calls,
        ):
            losses = detector.losses(images, targets)
        (sample,), (call,) = _heard(sampled, net), _heard(calls, net)
        _proposals, places, labels, _boxes = sample.answer
        places = [place.where(label > 0, -1) for place, label in zip(places, labels, strict=True)]
        logits = list(call.answer[0].split([len(place) for place in places]))
    return Answers(
        logits=torch.cat(logits),
        picture=torch.cat([torch.full_like(place, row) for row, place in enumerate(places)]),
        object=torch.cat(list(places)),
        softmax=softmax,
        losses=losses,
    )


def require_family(net: nn.Module) -> None:
    """Refuse a net whose assigner is not known.

    Raises:
        ModelError: it is of none of the families.
    """
    two_stages = isinstance(net, GeneralizedRCNN) and isinstance(net.roi_heads, RoIHeads)
    if not two_stages and not isinstance(net, (FCOS, RetinaNet, SSD)):
        raise _unknown(net)


def log_odds(logits: Tensor) -> Tensor:
    """log p - log(1 - p) of every class under softmax: (R, C) -> (R, C); exact where p is near 1."""
    top = F.one_hot(logits.argmax(1), logits.shape[1]).bool()
    log_p = logits.log_softmax(1)
    others = logits.masked_fill(top, -torch.inf).logsumexp(1, keepdim=True)
    # all but the largest p are 1/2 at most, where log(1 - p) loses nothing
    log_not = torch.log1p(-log_p.masked_fill(top, -torch.inf).exp())
    return torch.where(top, logits - others, log_p - log_not)


def classification_loss(logits: Tensor, labels: Tensor, *, softmax: bool) -> Tensor:
    """The sum of the classification loss over rows (R, C) of the classes `labels` (R,), in the net's
    own terms: cross-entropy under softmax, else torchvision's focal loss (alpha 1/4, gamma 2)."""
    if softmax:
        return F.cross_entropy(logits, labels, reduction="sum")
    wanted = F.one_hot(labels, logits.shape[1]).to(logits)
    loss: Tensor = sigmoid_focal_loss(logits, wanted, reduction="sum")
    return loss


@dataclass(frozen=True)
class _Call:
    given: tuple[Any, ...]
    answer: Any


@contextmanager
def _calls(owner: nn.Module, method: str) -> Iterator[list[_Call]]:
    """The calls of a method of one object, while the context is open."""
    calls: list[_Call] = []
    own: Callable[..., Any] | None = getattr(owner, method, None)
    if own is None:
        yield calls
        return
    before = vars(owner).get(method)

    def listening(*given: Any) -> Any:
        answer = own(*given)
        calls.append(_Call(given, answer))
        return answer

    setattr(owner, method, listening)
    try:
        yield calls
    finally:
        if before is None:
            delattr(owner, method)
        else:
            setattr(owner, method, before)


def _heard(calls: list[_Call], net: nn.Module) -> list[_Call]:
    if len(calls) != 1:
        raise _unknown(net)
    return calls


def _unknown(net: nn.Module) -> ModelError:
    return ModelError(
        f"Which predictions of a {type(net).__name__} stand for which object is not known, since it is "
        "none of torchvision's FCOS, RetinaNet, SSD and Faster R-CNN with their own losses; take one "
        "of these, or a defence that asks for losses alone, such as `ft_sam`."
    )
