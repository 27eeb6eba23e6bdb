"""What pictures that a defence did not learn on say of its result: accuracy, agreement, risk."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from bimask.errors import DataError
from bimask.inspection.risk import RiskProbe
from bimask.inspection.suspect import CleanImages
from bimask.nets.answers import logits_of

FEWEST = 10  # pictures; fewer say little


@dataclass(frozen=True)
class HeldBack:
    """Suspect and purified model on pictures held back.

    Attributes:
        images: how many.
        accuracy_before, accuracy_after: share answered with their label, in [0, 1]; None without
            labels.
        agreement: share that the purified model answers as the suspect, in [0, 1].
        risk: share of the suspect's short cuts that the purified model follows, in [0, 1], see
            `bimask.inspection.risk`; of the suspect itself it is 1. None where it could not be
            measured.
        reason: why not; else empty.
    """

    images: int
    accuracy_before: float | None
    accuracy_after: float | None
    agreement: float
    risk: float | None
    reason: str = ""


def held_back_evidence(model: nn.Module, purified: nn.Module, held: CleanImages) -> HeldBack | None:
    """Look at what a defence did with pictures that it did not learn on; None where they are too few.

    Args:
        model: the suspect, images -> logits, in eval mode.
        purified: what the defence made of it, with other pictures.
        held: the pictures held back.
    """
    if len(held.images) < FEWEST:
        return None
    images = held.floats().to(next(model.parameters()).device)
    before, after = logits_of(model, images).argmax(1), logits_of(purified, images).argmax(1)
    risk, reason = None, ""
    try:
        risk = RiskProbe(model, images)(purified).risk
    except DataError as error:
        reason = f"Risk was not measured: {error}"
    labels = None if held.labels is None else held.labels.to(images.device)
    accuracies = [None if labels is None else _share(one == labels) for one in (before, after)]
    return HeldBack(
        images=len(images),
        accuracy_before=accuracies[0],
        accuracy_after=accuracies[1],
        agreement=_share(before == after),
        risk=risk,
        reason=reason,
    )


def _share(which: Tensor) -> float:
    return which.float().mean().item()
