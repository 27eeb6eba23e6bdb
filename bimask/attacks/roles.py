"""What poisoning did to each sample, and the sets that hold such samples."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from bimask.data import ImageData


class Role(IntEnum):
    """What poisoning did to a sample. All but POISONED keep their true label."""

    CLEAN = 0
    POISONED = 1  # the trigger; the attack's label
    COVER = 2  # the trigger of a poisoned sample
    CROSS = 3  # something like the trigger that must not work: random noise, another image's trigger
    NEGATIVE = 4  # what the trigger does to another image, added to this one


@dataclass(frozen=True)
class PoisonedData:
    """A training set after poisoning.

    Attributes:
        data: images and the labels to train on.
        true_labels: (N,) labels before poisoning.
        roles: (N,) int64, a `Role` each.
    """

    data: ImageData
    true_labels: Tensor
    roles: Tensor

    def indices(self, role: Role) -> Tensor:
        """Positions of the samples in this role, ascending."""
        return (self.roles == role).nonzero().flatten()


@dataclass(frozen=True)
class PoisonedBatch:
    """A batch of training after poisoning.

    Attributes:
        images: (N, C, H, W) float in [0, 1]; part of the graph of an attack that learns.
        labels: (N,) to train on.
        roles: (N,) int64, a `Role` each.
        penalty: scalar to be added to the classifier's loss, or None.
    """

    images: Tensor
    labels: Tensor
    roles: Tensor
    penalty: Tensor | None = None


@dataclass(frozen=True)
class TriggeredData:
    """Triggered images that count for attack success and recovery.

    Attributes:
        images: (M, C, H, W) uint8, triggered.
        attack_labels: (M,) what the attacker wants.
        true_labels: (M,) what is right.
    """

    images: Tensor
    attack_labels: Tensor
    true_labels: Tensor

    def subset(self, index: Tensor) -> TriggeredData:
        """The images at `index` (integers), in its order."""
        return TriggeredData(self.images[index], self.attack_labels[index], self.true_labels[index])

    def to(self, device: torch.device | str) -> TriggeredData:
        """The same on another device."""
        return TriggeredData(
            self.images.to(device), self.attack_labels.to(device), self.true_labels.to(device)
        )
