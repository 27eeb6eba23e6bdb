"""The search of the smallest trigger towards every class at once, as Neural Cleanse makes it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATIENCE = 5  # epochs of one kind in a row, until the cost changes
DEARER, CHEAPER = 2.0, 2.0**-1.5
STALE, GAIN = 25, 0.99  # epochs without a mask of this share of the smallest, until a class ends
MAD_OF_NORMAL = 1.4826  # times the median deviation is the standard deviation of normal numbers
VALUES = 2**23  # of all images in one pass
FOUND = "found/"  # before the names of tensors that are no weights


class TriggerSearch(nn.Module):
    """A trigger towards each of K classes, what it costs, and the smallest that sufficed.

    Attributes:
        mask, pattern: (K, 1, H, W) and (K, C, H, W), any numbers: see `as_share`.
        cost: (K,) of a pixel of mask, in nats.
        above, below: (K,) epochs in a row that the trigger sufficed in, or did not.
        best_mask, best_pattern, best: the smallest trigger that sufficed, in [0, 1], and the sum of its
            mask, (K,), inf where none did.
        stale, reference: (K,) epochs without a gain on the size of reference.
        dearer, cheaper: (K,) whether the cost ever rose, and fell.
        going: (K,) whether the class is still searched.
    """

    mask: Tensor
    pattern: Tensor
    cost: Tensor
    above: Tensor
    below: Tensor
    best_mask: Tensor
    best_pattern: Tensor
    best: Tensor
    stale: Tensor
    reference: Tensor
    dearer: Tensor
    cheaper: Tensor
    going: Tensor

    def __init__(
        self, classes: int, shape: torch.Size, cost: float, generator: torch.Generator
    ) -> None:
        """
        Args:
            shape: (C, H, W) of an image.
            generator: CPU; draws one start for all classes, uniform in [0, 1].
        """
        super().__init__()
        for name, channels in (("mask", 1), ("pattern", shape[0])):
            start = torch.rand(channels, *shape[1:], generator=generator).clamp(1e-3, 1 - 1e-3)
            drawn = torch.atanh(2 * start - 1).repeat(classes, 1, 1, 1)
            setattr(self, name, nn.Parameter(drawn))
            self.register_buffer(f"best_{name}", torch.zeros_like(drawn))
        self.register_buffer("cost", torch.full((classes,), cost))
        for name in ("above", "below", "stale"):
            self.register_buffer(name, torch.zeros(classes, dtype=torch.long))
        for name in ("best", "reference"):
            self.register_buffer(name, torch.full((classes,), torch.inf))
        for name in ("dearer", "cheaper"):
            self.register_buffer(name, torch.zeros(classes, dtype=torch.bool))
        self.register_buffer("going", torch.ones(classes, dtype=torch.bool))

    @torch.no_grad()
    def note(self, success: Tensor, wanted: float) -> None:
        """What follows from an epoch: the smallest mask, the costs, and which classes end.

        Args:
            success: (K,) share of the images that each trigger sends to its class.
            wanted: the share that suffices.
        """
        mask, pattern = as_share(self.mask), as_share(self.pattern)
        size = mask.sum((1, 2, 3))
        enough = self.going & (success >= wanted)
        smaller = enough & (size < self.best)
        self.best_mask[smaller], self.best_pattern[smaller] = mask[smaller], pattern[smaller]
        self.best[smaller] = size[smaller]
        self.above = torch.where(enough, self.above + 1, 0)
        self.below = torch.where(enough, 0, self.below + 1)
        rises, falls = self.above >= PATIENCE, self.below >= PATIENCE
        self.cost[rises] *= DEARER
        self.cost[falls] *= CHEAPER
        self.above[rises], self.below[falls] = 0, 0
        self.dearer |= rises
        self.cheaper |= falls
        known = self.best.isfinite()
        gained = self.best < GAIN * self.reference
        self.stale = torch.where(gained | ~known, 0, self.stale + 1)
        self.reference = torch.minimum(self.reference, self.best)
        self.going &= ~(self.dearer & self.cheaper & (self.stale >= STALE))

    def flagged(self, threshold: float) -> list[int]:
        """The classes whose trigger is too small."""
        sizes = self.best.clamp_max(self.mask[0].numel())
        out = (anomaly_index(sizes) > threshold) & (sizes < middle(sizes)) & self.best.isfinite()
        return out.nonzero().flatten().tolist()

    def found(self, classes: list[int]) -> dict[str, Tensor]:
        """The smallest triggers of some classes, by the names that a result has them under."""
        return {
            FOUND + "classes": torch.tensor(classes),
            FOUND + "masks": self.best_mask[classes],
            FOUND + "patterns": self.best_pattern[classes],
        }


def as_share(value: Tensor) -> Tensor:
    """Any numbers as numbers in [0, 1]."""
    return value.tanh() / 2 + 0.5


def stamped(images: Tensor, masks: Tensor, patterns: Tensor) -> Tensor:
    """Images with a trigger: (..., C, H, W) in [0, 1] and (..., 1, H, W), (..., C, H, W) -> same."""
    return (1 - masks) * images + masks * patterns


def middle(values: Tensor) -> Tensor:
    """The median of (K,), of an even number the mean of the two in the middle."""
    return values.double().quantile(0.5)


def anomaly_index(sizes: Tensor) -> Tensor:
    """How many deviations each of (K,) is from the median, (K,) >= 0 in double precision."""
    away = (sizes.double() - middle(sizes)).abs()
    return away / (MAD_OF_NORMAL * middle(away)).clamp_min(1e-12)


def _parts(search: TriggerSearch, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Classes that are still searched, as many as go into one pass, and the images with their triggers:
    (J,) and (J, B, C, H, W)."""
    for rows in search.going.nonzero().flatten().split(max(1, VALUES // images.numel())):
        mask, pattern = as_share(search.mask[rows]), as_share(search.pattern[rows])
        yield rows, stamped(images, mask[:, None], pattern[:, None])


def search_step(
    net: nn.Module, search: TriggerSearch, adam: torch.optim.Optimizer, images: Tensor
) -> dict[str, float]:
    """One step of all triggers that are still searched; the mean of their losses by terms."""
    adam.zero_grad()
    terms = {"cross_entropy": 0.0, "size": 0.0}
    going = int(search.going.sum())
    for rows, triggered in _parts(search, images):
        logits = net(triggered.flatten(0, 1))
        wanted = rows.repeat_interleave(len(images))
        losses = {
            "cross_entropy": F.cross_entropy(logits, wanted, reduction="sum") / len(images),
            "size": (search.cost[rows] * as_share(search.mask[rows]).sum((1, 2, 3))).sum(),
        }
        torch.stack(list(losses.values())).sum().backward()
        for name, value in losses.items():
            terms[name] += value.item() / going
    adam.step()
    return terms


@torch.no_grad()
def success_of(net: nn.Module, search: TriggerSearch, images: Tensor, batch_size: int) -> Tensor:
    """The share of the images that each trigger sends to its class, (K,); 0 where a class has ended."""
    hits = torch.zeros_like(search.best)
    for batch in images.split(batch_size):
        for rows, triggered in _parts(search, batch):
            answers = net(triggered.flatten(0, 1)).argmax(1).unflatten(0, triggered.shape[:2])
            hits[rows] += (answers == rows[:, None]).sum(1).to(hits.dtype)
    return hits / len(images)
