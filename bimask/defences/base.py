"""The contract of every defence: its settings, its data, its steps, its result.

A study, the commands and the folder of a cleaned model know defences by this alone. A simple defence
writes `defend` and `restore`; one that shares work between configurations overrides `run`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from bimask.defences.settings import DefenceConfig
from bimask.defences.state import DefenceState
from bimask.errors import NonFiniteError, SettingError
from bimask.masking.masks import MaskSet


@dataclass(frozen=True)
class CleanData:
    """The defender's images.

    Attributes:
        images: (N, C, H, W), float in [0, 1].
        labels: (N,) int64; None where nobody said them, or where the defence declares no need.
    """

    images: Tensor
    labels: Tensor | None = None


class StepLog(Protocol):
    """One step of a defence: its number from 0, its loss by terms, and their sum."""

    @property
    def step(self) -> int: ...
    @property
    def losses(self) -> dict[str, float]: ...
    @property
    def loss(self) -> float: ...


@dataclass
class Passes:
    """Passes of one batch through the network, forward and backward."""

    forward: int = 0
    backward: int = 0

    def add(self, forward: int, backward: int) -> None:
        self.forward += forward
        self.backward += backward


class DefenceResult(Protocol):
    """What a defence ends with, or would end with now."""

    @property
    def config(self) -> DefenceConfig: ...
    @property
    def history(self) -> Sequence[StepLog]: ...
    @property
    def passes(self) -> Passes: ...
    @property
    def seconds(self) -> float: ...
    @property
    def changed(self) -> bool:
        """Whether the defence did anything to the model at all."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What `Defence.restore` needs beside the suspect, by name."""

    @property
    def numbers(self) -> dict[str, float]:
        """What the defence says of itself, under the names in `Defence.numbers`."""

    def model(self) -> nn.Module:
        """The defended model, in eval mode; the suspect is left as it is."""


@dataclass(frozen=True)
class Preparation:
    """What is made once a victim and shared by its trials.

    Attributes:
        doing: what is done, as in "searching triggers".
        make: (model, images, on_step=...) -> what `run` gets as `prepared`; it has `to(device)`.
        steps: (classes, images) -> how often `on_step` is called.
    """

    doing: str
    make: Callable[..., Any]
    steps: Callable[[int, int], int]


# of a member: its number, its step, and what it would end with now; a true answer ends it there
OnStep = Callable[[int, StepLog, Callable[[], DefenceResult]], "bool | None"]
# handed a function that takes the state, whenever there is one to take
BetweenSteps = Callable[[Callable[[], DefenceState]], None]
Config = TypeVar("Config", bound=DefenceConfig)


class Defence(ABC, Generic[Config]):
    """A way to take a backdoor out of a model.

    Class attributes:
        name: in `DEFENCES`, and in a study's YAML.
        config: its settings.
        needs_labels: whether the labels of the clean images are handed to it.
        numbers: what its results say of themselves, beyond accuracy and attack success.
        stem: of the file that a trial's tensors are kept in.
        has_twin: whether there is a model that keeps the backdoor and drops the rest.
        ends_early: whether a run may have fewer steps than its settings say.
    """

    name: ClassVar[str]
    config: type[Config]
    needs_labels: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = ()
    stem: ClassVar[str] = "tensors"
    has_twin: ClassVar[bool] = False
    ends_early: ClassVar[bool] = False

    def preparation(self, may_use: Callable[[str], bool]) -> Preparation | None:
        """What is to be made of a victim beforehand.

        Args:
            may_use: setting -> whether any trial may have it other than off.
        """
        return None

    def check(self, model: nn.Module, images: Tensor) -> None:
        """Refuse a model that the method can do nothing for, by its architecture alone: a study asks
        before it trains a victim.

        Args:
            images: (N, C, H, W) float in [0, 1], one at least.

        Raises:
            ModelError: it can do nothing for this model.
        """

    def batch_key(self, config: Config) -> Hashable:
        """Configurations of the same key may share one `run`."""
        return None

    @abstractmethod
    def run(
        self,
        model: nn.Module,
        clean: CleanData,
        configs: Sequence[Config],
        *,
        generators: Sequence[torch.Generator],
        prepared: Any = None,
        on_step: OnStep | None = None,
        state: DefenceState | None = None,
        between_steps: BetweenSteps | None = None,
    ) -> list[DefenceResult | NonFiniteError]:
        """Defend the model with every configuration: one result each, or the error that ended it alone.

        Args:
            model: the suspect, (N, C, H, W) in [0, 1] -> (N, K) logits; never edited.
            clean: the defender's images, and their labels where `needs_labels`.
            configs: of one `batch_key`.
            generators: CPU, one a configuration.
            prepared: what `preparation` made of this model and these images; None where it is not at
                hand, and is made here if it is needed.
            on_step: see `OnStep`.
            state: of a run with these configurations that was cut short.
            between_steps: see `BetweenSteps`.
        """

    @abstractmethod
    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor], config: Config) -> nn.Module:
        """The defended model from the suspect, which is left as it is, and what a trial stored."""

    def twin(self, model: nn.Module, tensors: Mapping[str, Tensor], config: Config) -> nn.Module | None:
        """The model that keeps the backdoor and drops the rest; None where the method has none."""
        return None

    def synthesised(
        self, model: nn.Module, tensors: Mapping[str, Tensor], images: Tensor, config: Config
    ) -> dict[str, Tensor]:
        """Perturbations (N, C, H, W) that the method makes up against the model, by kind; none where it
        makes up none."""
        return {}

    def masks(self, tensors: Mapping[str, Tensor], config: Config) -> MaskSet | None:
        """The masks in what a trial stored; None where the method has none."""
        return None


def check_images(images: Tensor) -> None:
    """Refuse clean images of another form than (N, C, H, W), float in [0, 1].

    Raises:
        SettingError: they are not.
    """
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        raise SettingError(
            "Clean images must be a float tensor (N, C, H, W) with N >= 1, got "
            f"{tuple(images.shape)} of {images.dtype}."
        )
    low, high = (value.item() for value in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise SettingError(
            f"Clean images must lie in [0, 1], got [{low:g}, {high:g}]; divide bytes by 255 and "
            "leave normalisation to the model."
        )
