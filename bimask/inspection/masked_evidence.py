"""What masks say of a suspected class: does the short cut go to the inverse twin?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bimask.inspection.class_triggers import ClassTriggers, Family
from bimask.masking.masks import MaskSet, fold


@dataclass(frozen=True)
class Followed:
    """Share of the images of other classes that are sent to the suspected one, in [0, 1]."""

    suspect: float
    purified: float
    inverse: float


@dataclass(frozen=True)
class MaskedEvidence:
    """Suspect, purified model and inverse twin under the suspected class's triggers.

    Attributes:
        followed: family of the trigger -> shares.
        agreement, inverse_agreement: with the suspect on clean images, in [0, 1].
    """

    followed: Mapping[Family, Followed]
    agreement: float
    inverse_agreement: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def masked_evidence(
    model: nn.Module,
    masks: MaskSet,
    images: Tensor,
    triggers: Mapping[Family, ClassTriggers],
    target: int,
) -> MaskedEvidence:
    """Ask the three models.

    Args:
        model: the suspect, images -> logits, in eval mode.
        masks: learned for it.
        images: (N, C, H, W) in [0, 1], clean.
        triggers: found against `model`.
        target: the suspected class.
    """
    purified, inverse = fold(model, masks), fold(model, masks, inverse=True)
    answers = model(images).argmax(1)
    others = answers != target

    def sent(net: nn.Module, triggered: Tensor) -> float:
        return (net(triggered).argmax(1) == target)[others].double().mean().item()

    followed = {}
    for family, found in triggers.items():
        triggered = found.apply(images)[target]
        followed[family] = Followed(*(sent(net, triggered) for net in (model, purified, inverse)))
    return MaskedEvidence(
        followed,
        (purified(images).argmax(1) == answers).double().mean().item(),
        (inverse(images).argmax(1) == answers).double().mean().item(),
    )
