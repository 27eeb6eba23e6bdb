"""Clean images that a defence holds back from itself, to choose among its candidates by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bimask.defences.base import CleanData


def split(clean: CleanData, share: float, generator: torch.Generator) -> tuple[CleanData, CleanData]:
    """Images to learn on, and images to choose by: `share` of every class, at least one and not all.

    A class of a single image is in both. Without labels the images are one class.

    Args:
        share: in (0, 1).
        generator: CPU.
    """
    labels = torch.zeros(len(clean.images)) if clean.labels is None else clean.labels.cpu()
    learn, choose = [], []
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held = min(max(1, round(share * len(rows))), max(1, len(rows) - 1))
        choose.append(rows[:held])
        learn.append(rows[held:] if len(rows) > 1 else rows)
    return _rows(clean, torch.cat(learn)), _rows(clean, torch.cat(choose))


def _rows(clean: CleanData, rows: Tensor) -> CleanData:
    index = rows.sort().values.to(clean.images.device)
    return CleanData(clean.images[index], None if clean.labels is None else clean.labels[index])


@torch.no_grad()
def accuracy(net: Callable[[Tensor], Tensor], clean: CleanData, batch_size: int = 512) -> float:
    """The share of images, in [0, 1], that the net, in the mode it is in, gives their label."""
    assert clean.labels is not None
    right = sum(
        int((net(images).argmax(1) == labels).sum())
        for images, labels in zip(
            clean.images.split(batch_size), clean.labels.split(batch_size), strict=True
        )
    )
    return right / len(clean.images)
