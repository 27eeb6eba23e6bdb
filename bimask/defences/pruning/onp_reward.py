"""What a mask is worth, without the attack: accuracy kept, short cuts given up, channels spared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bimask.defences.base import CleanData
from bimask.defences.pruning.onp_graph import Structure
from bimask.errors import DataError
from bimask.inspection.risk import RiskProbe
from bimask.inspection.shared_errors import SharedErrors
from bimask.masking.frozen import FrozenNet

Bait = Literal["shared", "triggers"]
PER_PASS = 2048  # images
PERCENT = 0.01


@dataclass(frozen=True)
class Worth:
    """Of some masks, (K,) float64 each.

    Attributes:
        reward: R.
        terms: name -> what is taken off: "accuracy", "followed", "pruned".
        accuracy, followed, pruned: shares in [0, 1].
    """

    reward: Tensor
    terms: dict[str, Tensor]
    accuracy: Tensor
    followed: Tensor
    pruned: Tensor


class Reward:
    """R(a) = -[w_c max(0, acc_0 - acc(a) - budget) / 0.01 + w_b B(a) + w_n pruned(a)].

    acc is the accuracy on clean images, acc_0 that of the suspect. B is the share of short cuts of the
    suspect that the pruned model still follows:

        shared     of adversarial images that the suspect errs on, those with the same error
                   (`SharedErrors`)
        triggers   of images that a searched trigger leads to its class, those still led there, by how
                   suspicious the class is (`RiskProbe`)

    Args:
        net: the suspect as one that takes masks.
        suspect: the same, plain.
        clean: images (N, C, H, W) in [0, 1] with labels.
    """

    def __init__(
        self,
        net: FrozenNet,
        suspect: nn.Module,
        structure: Structure,
        clean: CleanData,
        *,
        bait: Bait,
        budget: float,
        accuracy_weight: float,
        followed_weight: float,
        pruned_weight: float,
    ) -> None:
        assert clean.labels is not None
        self._net, self._structure = net, structure
        self._images, self._labels = clean.images, clean.labels
        self._budget = budget
        self._weights = (accuracy_weight, followed_weight, pruned_weight)
        self._bait, self._answers, self._counts = _bait(suspect, clean.images, bait)
        unpruned = self(torch.zeros(1, structure.count, dtype=torch.bool))
        self.before = float(unpruned.accuracy)
        self.followed_before = float(unpruned.followed)

    before: float = 1.0  # accuracy of the suspect

    def __call__(self, masks: Tensor) -> Worth:
        """(K, nodes) booleans."""
        right = self._hits(masks, self._images, self._labels).double().mean(1)
        followed = torch.zeros(len(masks), dtype=torch.float64)
        if len(self._bait):
            hits = self._hits(masks, self._bait, self._answers).double()
            followed = (hits @ self._counts).clamp(0, 1)
        pruned = masks.double().mean(1)
        lost = (self.before - right - self._budget - 1e-9).clamp_min(0) / PERCENT
        values = (lost, followed, pruned)
        names = ("accuracy", "followed", "pruned")
        terms = {n: w * v for n, w, v in zip(names, self._weights, values, strict=True)}
        reward = -torch.stack(list(terms.values())).sum(0)
        return Worth(reward, terms, right, followed, pruned)

    @torch.no_grad()
    def _hits(self, masks: Tensor, images: Tensor, answers: Tensor) -> Tensor:
        """(K, N) booleans: which images get which answers under which mask."""
        factors = self._structure.keeps(masks).to(images)
        found = []
        parts = max(1, PER_PASS // len(masks))
        for some, wanted in zip(images.split(parts), answers.split(parts), strict=True):
            logits = self._net(some.repeat(len(masks), 1, 1, 1), factors)
            found.append(logits.argmax(1).view(len(masks), -1) == wanted)
        return torch.cat(found, 1).cpu()


def _bait(suspect: nn.Module, images: Tensor, kind: Bait) -> tuple[Tensor, Tensor, Tensor]:
    """Images (M, C, H, W), the answers of one that follows them (M,), and how much each counts (M,)."""
    if kind == "shared":
        errors = SharedErrors(suspect, images)
        count = len(errors.images)
        return (
            errors.images,
            errors.errors,
            torch.full((count,), 1 / max(1, count), dtype=torch.float64),
        )
    try:
        probe = RiskProbe(suspect, images)
    except DataError:  # nothing leads it astray
        return images[:0], torch.zeros(0, dtype=torch.int64), torch.zeros(0).double()
    shown, wanted, weights = [], [], []
    for universal in probe.universal:
        counts = universal.counts
        share = counts.double().cpu() / counts.sum(1, keepdim=True).clamp_min(1).cpu()
        weight = share * probe.weights[probe.asked].cpu()[:, None] / len(probe.universal)
        shown.append(universal.images[counts])
        wanted.append(universal.towards.expand_as(counts)[counts])
        weights.append(weight[counts.cpu()])
    return torch.cat(shown), torch.cat(wanted), torch.cat(weights)
