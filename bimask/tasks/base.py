"""What a task is: a kind of models, with what is measured of them and what is done to them.

A task loads what it works with when it is first asked for it: torchvision's detectors take a second
that a study of classifiers need not spend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import nn

from bimask.defences.base import Defence, DefenceResult

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Metric:
    """A score in [0, 1] of a model.

    Attributes:
        name, short: for people, as "clean accuracy" and "ACC".
        counts: which inputs it is the share of, or what else it measures.
        needs_trigger: whether nobody can measure it without the true trigger.
    """

    direction: Direction
    name: str
    short: str
    counts: str
    needs_trigger: bool = False


class Probe(ABC):
    """What says of a defended model, without the attack, how much of a backdoor is left."""

    @abstractmethod
    def images(self, val: Any, seed: int) -> Any:
        """Those of the clean data of `val` that are asked with."""

    @abstractmethod
    def make(self, model: nn.Module, images: Any, *, on_step: Callable[[], None] | None = None) -> Any:
        """What is asked, made once of the suspect; it has `to(device)`."""

    @abstractmethod
    def steps(self, classes: int, images: Any) -> int:
        """How often `on_step` is called."""

    @abstractmethod
    def ask(self, made: Any, model: nn.Module, twin: nn.Module | None) -> dict[str, float]:
        """What is said of a defended model and its twin, where it has one; `risk` is among it."""


class Predictor(Protocol):
    """A model that is asked from outside.

    Attributes:
        shape: (C, H, W) of an image; of the largest, where they may differ in size.
    """

    shape: tuple[int, int, int]

    def __call__(self, images: Any) -> list[dict[str, Any]]:
        """What it says of each image, in JSON's types; images as of `bimask.data.sent`.

        Raises:
            DataError: an image is none, or none that it takes.
        """


class Task(ABC):
    """A kind of models. Scores, data, specs and victims are the task's own.

    Class attributes:
        name: in `TASKS`, and in a study's YAML.
        metrics: score -> how it is read, in the order in which people see them; each is an attribute of
            the task's scores.
        quality: the score of clean inputs that a defence may not cost; `accuracy_drop` is its fall.
        price: what that costs, in a sentence: "0.3 points of accuracy".
        recovered: the score that says how often triggered inputs are answered as they should be.
        objectives: what a study searches by unless it says otherwise.
        defence: the name of the defence that a study searches unless it says otherwise.
        probe: for blind selection; None where there is none.
        answers: what such a model says of an image, in words for people.
    """

    name: ClassVar[str]
    metrics: ClassVar[Mapping[str, Metric]]
    quality: ClassVar[str]
    price: ClassVar[str]
    recovered: ClassVar[str]
    objectives: ClassVar[tuple[str, ...]]
    defence: ClassVar[str]
    probe: ClassVar[Probe | None] = None
    answers: ClassVar[str]

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Callable[[str], Task], tuple[str]]:
        from bimask.tasks import task_named  # which knows this module

        return task_named, (self.name,)  # in another process it is that one's own

    # --- victims ---

    @property
    @abstractmethod
    def spec(self) -> type[Any]:
        """Of a victim."""

    @abstractmethod
    def check_data(self, spec: Any, splits: Any) -> None:
        """Refuse data that attack or scores can do nothing with.

        Raises:
            BimaskError: they can.
        """

    @abstractmethod
    def fresh_net(self, spec: Any, data: Any) -> nn.Module:
        """A victim's net with new weights."""

    @abstractmethod
    def obtain_victim(
        self,
        spec: Any,
        root: Path,
        *,
        device: torch.device | str = "cpu",
        on_epoch: Callable[[Any], None] | None = None,
        on_prepare: Callable[[str, int, int], None] | None = None,
    ) -> Any:
        """The victim, loaded from its folder in `root`, or trained and saved there."""

    @abstractmethod
    def open_victim(self, folder: Path) -> Any:
        """The victim in a folder, built by whatever code that names."""

    @abstractmethod
    def draw_victim(self, path: Path, victim: Any, sets: Any) -> None:
        """A PNG of what a victim's trigger does; none where nothing belongs together."""

    def pictures(self, victim: Any, model: nn.Module, sets: Any) -> dict[str, Any]:
        """Pillow's pictures of what a model does, by what is shown; none where a study's page asks the
        models itself (`study.report.answers`)."""
        return {}

    # --- measures ---

    @abstractmethod
    def evaluate(self, model: nn.Module, sets: Any) -> Any:
        """The scores of a model on a victim's evaluation sets."""

    def glance(self, model: nn.Module, sets: Any) -> Any:
        """The same, where it is done often while a defence runs."""
        return self.evaluate(model, sets)

    def derived(self, scores: Any, before: Any) -> dict[str, float]:
        """Numbers that are made of scores and of the suspect's own."""
        return {}

    def quality_of(self, scores: Any) -> float:
        """The quality among some scores."""
        return float(getattr(scores, self.quality))

    def short(self, name: str) -> str:
        """What a number is called in a table: a score by its short name, `risk` as it is."""
        return self.metrics[name].short if name in self.metrics else name

    def told(self, scores: Any) -> str:
        """All scores in a line."""
        return ", ".join(self._told(scores, name) for name in self.metrics)

    def in_short(self, scores: Any) -> str:
        """Quality and attack success, beside a bar."""
        shown = (self.quality, "attack_success")
        return "  ".join(self._told(scores, name) for name in shown)

    def _told(self, scores: Any, name: str) -> str:
        return f"{self.short(name)} {getattr(scores, name):.3f}"

    # --- cleaned models ---

    @abstractmethod
    def save_cleaned(
        self,
        out: Path,
        victim: Any,
        splits: Any,
        result: DefenceResult,
        *,
        clean_images_per_class: int,
        seed: int,
    ) -> None:
        """Write the folder of a defended victim, with its scores on `test` before and after.

        Args:
            out: a new folder.
            splits: the victim's clean data.
            result: of a defence on the victim, on the CPU.
            clean_images_per_class, seed: what the defence learned on, and its seed.
        """

    @abstractmethod
    def predictor(self, folder: Path, *, own_code: bool = False) -> Predictor:
        """What answers in the folder of a cleaned model.

        Args:
            own_code: whether the code of an own net in it may be imported and run.

        Raises:
            VictimError: the folder cannot be read, or is built by code that is not allowed.
        """

    # --- defences ---

    @property
    @abstractmethod
    def defences(self) -> Mapping[str, Defence[Any]]:
        """By name."""
