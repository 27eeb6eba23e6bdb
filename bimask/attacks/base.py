"""The contract of an attack: a pure trigger, a label rule, and which samples are poisoned how."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, TypeVar, final

import numpy as np
import torch
from torch import Tensor, nn

from bimask.attacks.roles import PoisonedBatch, PoisonedData, Role, TriggeredData
from bimask.data import ImageData
from bimask.errors import DataError, SettingError

LabelRule = Literal["all_to_one", "all_to_all"]
RateOf = Literal["dataset", "target_class"]
FitNet = Callable[[ImageData], nn.Module]  # clean images with labels -> a net trained on them
OnStep = Callable[[int, int], None]  # steps done, of how many
T = TypeVar("T")

PART = 512  # images at once, where whole sets are triggered


class Attack(ABC):
    """A backdoor attack. Built with hyper-parameters, called with images.

    A new attack writes `trigger`; checks, rounding, label rule and the choice of samples are here
    once. What it may write besides:

    - `learn`, `state` and `restore` (with `has_state`), if its trigger is made and not only computed;
    - `poisoned`, if training samples carry another trigger than test images;
    - `companions` and `companions_wanted` (with `companion`), if others than the poisoned samples
      are changed;
    - `poison_batch` and `step`, if it learns while the victim does (with `batchwise`), and
      `learning_state` and `resume_learning`, so that a training can be gone on from.

    Args:
        target: the class every triggered image shall get, under "all_to_one".
        label_rule: "all_to_one", or "all_to_all": label y becomes y + 1 modulo the classes.

    Class attributes:
        clean_label: poisoned samples are of the target class and keep their label.
        batchwise: samples are poisoned inside the training loop, others in every epoch.
        has_state: `state` is needed beside the hyper-parameters to trigger new images.
        companion: role of the samples that are changed but keep their label, if there are such.
    """

    clean_label: ClassVar[bool] = False
    batchwise: ClassVar[bool] = False
    has_state: ClassVar[bool] = False
    companion: ClassVar[Role | None] = None

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

    # --- what an attack is ---

    @abstractmethod
    def trigger(self, images: Tensor) -> Tensor:
        """The triggered images, not yet clipped: (N, C, H, W) float in [0, 1] -> same shape."""

    def learn(self, data: ImageData, fit_net: FitNet, on_step: OnStep) -> None:  # noqa: B027 (most: nothing)
        """Make what the trigger needs from clean training data; torch's random state is seeded."""

    def state(self) -> dict[str, Tensor]:
        """All that the trigger of new images needs beside the hyper-parameters, on the CPU.

        Raises:
            SettingError: the attack was not prepared.
        """
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 (most have no state)
        """Take over what `state` gave; KeyError, RuntimeError or ValueError if it is something else."""

    def poisoned(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """The images of training samples with the trigger, not yet clipped; same shape."""
        return self.trigger(images)

    def companions_wanted(self, poisoned: int, total: int) -> int:
        """How many companions go with so many poisoned ones of `total` samples."""
        return 0

    def companions(self, images: Tensor, others: Tensor, *, generator: torch.Generator) -> Tensor:
        """The companions' images, not yet clipped; `others` has another clean image for each."""
        raise NotImplementedError

    def step(self) -> None:  # noqa: B027 (most learn nothing)
        """Learn from the gradients of a batch of `poison_batch`, once they are there."""

    def learning_state(self) -> dict[str, Tensor]:
        """All that decides how it learns on with a victim, between two batches; `state` or more."""
        return self.state() if self.has_state else {}

    def resume_learning(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from what `learning_state` gave, in place of being prepared."""
        if self.has_state:
            self.restore(state)

    # --- preparation ---

    @final
    def prepare(
        self,
        data: ImageData,
        *,
        seed: int,
        fit_net: FitNet | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        """Make the attack ready for poisoning; the same data and seed make the same trigger.

        Args:
            data: clean training images, on the device to work on.
            fit_net: trains a classifier on such images; some attacks need one (SettingError).
            on_step: called with the steps done and how many there are, by attacks that take steps.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.learn(data, fit_net or self._no_net, on_step or _nobody)

    def _no_net(self, data: ImageData) -> nn.Module:
        raise SettingError(f"{type(self).__name__} needs a cleanly trained net: give `fit_net`.")

    @final
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Make the attack ready for new images with the `state` of an equal one.

        Raises:
            SettingError: not the state of such an attack, or not finite.
        """
        odd = [name for name, value in state.items() if not value.isfinite().all()]
        if odd:
            raise SettingError(f"The trigger state {odd[0]!r} holds NaN or infinity.")
        try:
            self.restore(state)
            if extra := set(state) - set(self.state()):
                raise ValueError(f"{sorted(extra)[0]} is not known")
        except (IndexError, KeyError, RuntimeError, ValueError) as error:
            raise SettingError(
                f"This is not the state of a trigger of {type(self).__name__} "
                f"({type(error).__name__}: {' '.join(str(error).split())})."
            ) from error

    def _ready(self, value: T | None) -> T:
        """What preparation made, or an error that says what is missing."""
        if value is None:
            raise SettingError(
                f"{type(self).__name__} is not ready: call `prepare` with clean training images, or "
                "`load_state`."
            )
        return value

    # --- triggers on images ---

    @final
    def apply(self, images: Tensor) -> Tensor:
        """Put the trigger on images: float (N, C, H, W) in [0, 1] -> same; pure.

        Raises:
            SettingError: another shape, bytes, a trigger that does not fit the image, or one that
                is not ready.
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise SettingError(
                f"`apply` needs float images (N, C, H, W) in [0, 1], got {images.dtype} "
                f"{tuple(images.shape)}."
            )
        return self.trigger(images.clone()).clamp(0, 1)

    @final
    @torch.no_grad()
    def apply_bytes(self, images: Tensor) -> Tensor:
        """The trigger on stored images: uint8 (N, C, H, W) -> same, rounded, never wrapped."""
        return torch.cat([as_bytes(self.apply(part.float() / 255)) for part in images.split(PART)])

    @final
    def attack_labels(self, labels: Tensor, num_classes: int) -> Tensor:
        """The label the attacker wants for each true label: (N,) -> (N,)."""
        self._check_target(num_classes)
        if self.label_rule == "all_to_all":
            return (labels + 1) % num_classes
        return torch.full_like(labels, self.target)

    # --- poisoning ---

    @final
    def share(self, data: ImageData, *, rate: float, rate_of: RateOf = "dataset") -> float:
        """Share of all samples that such a rate poisons. Raises what `poison` raises."""
        _, total, _ = self._counted(data, rate, rate_of)
        return rate * total / len(data)

    @final
    @torch.no_grad()
    def poison(
        self, data: ImageData, *, rate: float, seed: int, rate_of: RateOf = "dataset"
    ) -> PoisonedData:
        """Poison a training set; the argument stays as it is.

        Dirty label: round(rate x N) samples drawn from *all* samples, the target class too, so that
        the flipped share is a little smaller. Clean label: drawn from the target class alone.
        Companions are drawn from the rest, as many as are left.

        Args:
            rate: in (0, 1].
            rate_of: denominator of the rate, "dataset" as in the field, or "target_class".

        Raises:
            SettingError: a rate out of range, or an attack that is not ready.
            DataError: a rate that selects no sample, or more than there are.
        """
        count, _, pool = self._counted(data, rate, rate_of)
        order = pool[np.random.default_rng(seed).permutation(len(pool))]
        last = count + self.companions_wanted(count, len(data))
        chosen, beside = (part.sort().values for part in (order[:count], order[count:last]))
        # a stream of its own: batches are drawn by the seed as well
        generator = torch.Generator().manual_seed(seed)
        others = _others(beside, len(data), generator)
        device = data.images.device
        chosen, beside, others = chosen.to(device), beside.to(device), others.to(device)

        images, labels = data.images.clone(), data.labels.clone()
        for part in chosen.split(PART):
            images[part] = as_bytes(self.poisoned(data.floats(part), generator=generator))
        for part, other in zip(beside.split(PART), others.split(PART), strict=True):
            if len(part):
                changed = self.companions(data.floats(part), data.floats(other), generator=generator)
                images[part] = as_bytes(changed)
        if not self.clean_label:
            labels[chosen] = self.attack_labels(labels[chosen], data.num_classes)
        roles = torch.full_like(labels, Role.CLEAN)
        roles[chosen] = Role.POISONED
        if self.companion is not None:
            roles[beside] = self.companion
        return PoisonedData(ImageData(images, labels, data.classes), data.labels, roles)

    def poison_batch(
        self,
        images: Tensor,
        labels: Tensor,
        num_classes: int,
        *,
        share: float,
        generator: torch.Generator,
    ) -> PoisonedBatch:
        """Poison a shuffled batch: the first int(share x N) samples, then the companions.

        Where share x N is below one, a batch gets one poisoned sample that often.

        Args:
            images: (N, C, H, W) float in [0, 1], clean; they stay as they are.
            labels: (N,).
            generator: of the CPU.
        """
        n = len(images)
        count = int(share * n + 1e-9)  # 0.29 x 100 is 28.999...
        if not count:
            count = int(torch.rand((), generator=generator).item() < share * n)
        last = min(n, count + self.companions_wanted(count, n))
        others = _others(torch.arange(count, last), n, generator).to(images.device)
        roles = torch.full_like(labels, Role.CLEAN)
        labels, parts = labels.clone(), []
        if count:
            parts.append(self.poisoned(images[:count].clone(), generator=generator))
            labels[:count] = self.attack_labels(labels[:count], num_classes)
            roles[:count] = Role.POISONED
        if self.companion is not None and last > count:
            beside = images[count:last].clone()
            parts.append(self.companions(beside, images[others], generator=generator))
            roles[count:last] = self.companion
        return PoisonedBatch(torch.cat([*parts, images[last:]]).clamp(0, 1), labels, roles)

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

    def _counted(self, data: ImageData, rate: float, rate_of: RateOf) -> tuple[int, int, Tensor]:
        """Samples to poison, the rate's denominator, and the positions to choose from."""
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
        return count, total, pool

    def _check_target(self, num_classes: int) -> None:
        if self.target >= num_classes:
            raise SettingError(
                f"`target` must be one of the {num_classes} classes 0 to {num_classes - 1}, got "
                f"{self.target}."
            )


def _nobody(done: int, of: int) -> None:
    """Nobody is told."""


def as_bytes(images: Tensor) -> Tensor:
    """Float images as uint8: clipped to [0, 1] first, so that nothing wraps, and rounded."""
    return (images.clamp(0, 1) * 255).round().byte()


def _others(rows: Tensor, total: int, generator: torch.Generator) -> Tensor:
    """For every position of `total` another one, where there is another."""
    away = torch.randint(1, max(2, total), rows.shape, generator=generator)
    return (rows + away) % total


def fixed_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Uniform noise in [0, 1) of a shape, the same on every machine and version for a seed."""
    key = hashlib.sha256(f"{seed}|{shape}".encode()).digest()[:8]
    noise = np.random.Generator(np.random.PCG64(int.from_bytes(key, "little"))).random(shape)
    return torch.from_numpy(noise).float()
