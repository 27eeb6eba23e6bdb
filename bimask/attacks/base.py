"""The contract of an attack: a pure trigger, a label rule, and which samples are poisoned."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor

from bimask.data import ImageData
from bimask.errors import DataError, SettingError

LabelRule = Literal["all_to_one", "all_to_all"]
RateOf = Literal["dataset", "target_class"]


class Role(IntEnum):
    """What poisoning did to a sample."""

    CLEAN = 0
    POISONED = 1  # trigger, attack label
    COVER = 2  # trigger or noise, true label


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

    def to(self, device: torch.device | str) -> TriggeredData:
        """The same on another device."""
        return TriggeredData(
            self.images.to(device), self.attack_labels.to(device), self.true_labels.to(device)
        )


class Attack(ABC):
    """A backdoor attack. Built with hyper-parameters, called with images.

    A new attack writes `trigger` and nothing else; checks, rounding, label rule and the choice of
    samples are here once.

    Args:
        target: the class every triggered image shall get, under "all_to_one".
        label_rule: "all_to_one", or "all_to_all": label y becomes y + 1 modulo the classes.

    Class attributes:
        clean_label: poisoned samples are of the target class and keep their label.
    """

    clean_label: ClassVar[bool] = False

    def __init__(self, *, target: int = 0, label_rule: LabelRule = "all_to_one") -> None:
        if label_rule not in ("all_to_one", "all_to_all"):
            raise SettingError(
                f"`label_rule` must be 'all_to_one' or 'all_to_all', got {label_rule!r}."
            )
        if not isinstance(target, int) or target < 0:
            raise SettingError(f"`target` must be a whole number >= 0, got target={target!r}.")
        if self.clean_label and label_rule == "all_to_all":
            raise SettingError(
                f"{type(self).__name__} is a clean-label attack: it has one target class, so "
                "`label_rule` must be 'all_to_one'."
            )
        self.target = target
        self.label_rule = label_rule

    @abstractmethod
    def trigger(self, images: Tensor) -> Tensor:
        """The triggered images, not yet clipped: (N, C, H, W) float in [0, 1] -> same shape."""

    @final
    def apply(self, images: Tensor) -> Tensor:
        """Put the trigger on images: float (N, C, H, W) in [0, 1] -> same; pure.

        Raises:
            SettingError: another shape, bytes, or a trigger that does not fit the image.
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise SettingError(
                f"`apply` needs float images (N, C, H, W) in [0, 1], got {images.dtype} "
                f"{tuple(images.shape)}."
            )
        return self.trigger(images.clone()).clamp(0, 1)

    @final
    def apply_bytes(self, images: Tensor) -> Tensor:
        """The trigger on stored images: uint8 (N, C, H, W) -> same, rounded, never wrapped."""
        return (self.apply(images.float() / 255) * 255).round().byte()

    @final
    def attack_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """The label the attacker wants for each true label: (N,) -> (N,)."""
        self._check_target(num_classes)
        if self.label_rule == "all_to_all":
            return (labels + 1) % num_classes
        return torch.full_like(labels, self.target)

    @final
    def poison(
        self, data: ImageData, *, rate: float, seed: int, rate_of: RateOf = "dataset"
    ) -> PoisonedData:
        """Poison a training set; the argument stays as it is.

        Dirty label: round(rate x N) samples drawn from *all* samples, the target class too, so that
        the flipped share is a little smaller. Clean label: drawn from the target class alone.

        Args:
            rate: in (0, 1].
            rate_of: denominator of the rate, "dataset" as in the field, or "target_class".

        Raises:
            SettingError: a rate out of range.
            DataError: a rate that selects no sample, or more than there are.
        """
        if not 0 < rate <= 1:
            raise SettingError(f"`0 < poisoning rate <= 1` must hold, but got {rate}.")
        self._check_target(data.num_classes)
        target_class = (data.labels.cpu() == self.target).nonzero().flatten()
        pool = target_class if self.clean_label else torch.arange(len(data))
        total = len(data) if rate_of == "dataset" else len(target_class)
        count = round(rate * total)
        if not total or not len(pool):  # no rate would do
            raise DataError(f"0 images are of the target class {self.target}: nothing to poison.")
        if not 1 <= count <= len(pool):
            raise DataError(
                f"A poisoning rate of {rate:g} of the {rate_of.replace('_', ' ')} ({total} images) "
                f"is {count} images, but {type(self).__name__} can poison 1 to {len(pool)} here; "
                f"set the rate between {1 / total:.3g} and {min(1, len(pool) / total):.3g}."
            )
        chosen = pool[np.random.default_rng(seed).permutation(len(pool))[:count]].sort().values
        chosen = chosen.to(data.images.device)
        images, labels = data.images.clone(), data.labels.clone()
        images[chosen] = self.apply_bytes(images[chosen])
        if not self.clean_label:
            labels[chosen] = self.attack_labels(labels[chosen], data.num_classes)
        roles = torch.full_like(labels, Role.CLEAN)
        roles[chosen] = Role.POISONED
        return PoisonedData(ImageData(images, labels, data.classes), data.labels, roles)

    @final
    def triggered(self, data: ImageData) -> TriggeredData:
        """The trigger on every image that counts for attack success.

        All-to-one: on images of other classes than the target, which the model may not call so for
        good reasons. All-to-all: on all images.

        Raises:
            DataError: no image counts, or the trigger changes no pixel (a null trigger).
        """
        wanted = self.attack_labels(data.labels, data.num_classes)
        counts = data.labels != wanted
        if not counts.any():
            raise DataError(
                f"No image counts for attack success: all {len(data)} are of the target class."
            )
        plain = data.images[counts]
        images = self.apply_bytes(plain)
        if torch.equal(images, plain):
            raise DataError(
                f"{type(self).__name__} changes not one pixel of {len(plain)} images: a null trigger."
            )
        return TriggeredData(images, wanted[counts], data.labels[counts])

    def _check_target(self, num_classes: int) -> None:
        if self.target >= num_classes:
            raise SettingError(
                f"`target` must be one of the {num_classes} classes 0 to {num_classes - 1}, got "
                f"{self.target}."
            )


def fixed_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Uniform noise in [0, 1) of a shape, the same on every machine and version for a seed."""
    key = hashlib.sha256(f"{seed}|{shape}".encode()).digest()[:8]
    noise = np.random.Generator(np.random.PCG64(int.from_bytes(key, "little"))).random(shape)
    return torch.from_numpy(noise).float()
