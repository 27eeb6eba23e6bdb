"""Defences that run one configuration at a time: such a one writes `defend` and `restore`."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic

import torch
from torch import Tensor, nn

from bimask.defences.base import (
    BetweenSteps,
    CleanData,
    Config,
    Defence,
    DefenceResult,
    OnStep,
    Passes,
    StepLog,
    check_images,
)
from bimask.defences.settings import DefenceConfig
from bimask.defences.state import DefenceState
from bimask.errors import NonFiniteError
from bimask.masking.copies import copied
from bimask.nets.admission import unwrapped

BESIDE = "@"  # begins the names of tensors that tell of a run and are none of the defended model's

# of one run: its step, and what it would end with now; a true answer ends it there
OnOwnStep = Callable[[StepLog, Callable[[], DefenceResult]], "bool | None"]


@dataclass(frozen=True)
class Step:
    """A step of a defence that has no stages."""

    step: int
    losses: dict[str, float]
    loss: float


@dataclass(frozen=True)
class Halfway:
    """Where one configuration stands between two of its steps; only its defence understands it.

    Attributes:
        tensors: by name, on the CPU.
        about: JSON types.
    """

    tensors: dict[str, Tensor]
    about: dict[str, Any]


@dataclass(frozen=True)
class Keeper:
    """What lets one configuration go on in the middle.

    Attributes:
        begun: where it stood when it was cut short; None where it begins.
        keep: handed a function that takes where it stands, whenever there is a place to go on from.
    """

    begun: Halfway | None = None
    keep: Callable[[Callable[[], Halfway]], None] = lambda _: None


BEGINNING = Keeper()


class SimpleDefence(Defence[Config]):
    """Configurations run one after another. What is kept is what those left that ended, and of the one
    that runs what its defence hands to `keeper`; where that is nothing, it begins anew, and ends with
    the same bits."""

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
        self.check_clean(clean)
        results = self._ended(model, configs, state)
        resumed = len(results)
        began = time.perf_counter() - (state.seconds if results and state is not None else 0)
        for member, config in enumerate(configs):
            if member < len(results):
                continue
            heard = None if on_step is None else _of_member(on_step, member)

            def keep(take: Callable[[], Halfway]) -> None:
                if between_steps is not None:
                    spent = time.perf_counter() - began
                    between_steps(lambda: _state_of(configs, results, spent, take()))

            begun = _halfway(state, member) if member == resumed else None
            try:
                results.append(
                    self.defend(
                        model,
                        clean,
                        config,
                        generator=generators[member],
                        prepared=prepared,
                        on_step=heard,
                        keeper=Keeper(begun, keep),
                    )
                )
            except NonFiniteError as error:
                results.append(error)
            if between_steps is not None:
                between_steps(lambda: _state_of(configs, results, time.perf_counter() - began))
        return list(results)

    def _ended(
        self, model: nn.Module, configs: Sequence[Config], state: DefenceState | None
    ) -> list[Defended[Config] | NonFiniteError]:
        """What ended before the run was cut short; nothing of one with other configurations."""
        settings = [config.model_dump(mode="json") for config in configs]
        if state is None or [one["config"] for one in state.members] != settings:
            return []
        found: list[Defended[Config] | NonFiniteError] = []
        for member, (about, config) in enumerate(zip(state.members, configs, strict=True)):
            if not about["ended"]:
                break
            if about["failure"] is not None:
                found.append(NonFiniteError(about["failure"]))
                continue
            prefix = f"{member}/"
            found.append(
                Defended(
                    self,
                    model,
                    config,
                    {
                        k.removeprefix(prefix): t
                        for k, t in state.tensors.items()
                        if k.startswith(prefix)
                    },
                    about["numbers"],
                    tuple(Step(**step) for step in about["history"]),
                    Passes(**about["passes"]),
                    about["seconds"],
                )
            )
        return found

    def check_clean(self, clean: CleanData) -> None:
        """Refuse clean data of another form than this defence takes.

        Raises:
            SettingError: they are.
        """
        check_images(clean.images)

    @abstractmethod
    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: Config,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[Config]:
        """Defend with one configuration, and leave `model` as it is.

        Raises:
            NonFiniteError: a loss is NaN or infinite.
        """

    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor], config: Config) -> nn.Module:
        """A copy of the model that has these tensors in place of its own; a method that stores anything
        else writes its own."""
        return with_tensors(model, tensors)


@dataclass(frozen=True)
class Defended(Generic[Config]):
    """The result of a simple defence: what it stored, and how a model is made of that.

    Attributes:
        suspect: the model that was defended.
    """

    defence: Defence[Config] = field(repr=False)
    suspect: nn.Module = field(repr=False)
    config: Config
    tensors: dict[str, Tensor]
    numbers: dict[str, float] = field(default_factory=dict)
    history: tuple[Step, ...] = ()
    passes: Passes = field(default_factory=Passes)
    seconds: float = 0.0

    @property
    def changed(self) -> bool:
        """Whether any tensor of the model differs from the suspect's own, or there is one that it has
        not."""
        own = unwrapped(self.suspect)[0].state_dict()
        return any(
            name not in own or not torch.equal(value.to(own[name]), own[name])
            for name, value in self.tensors.items()
            if not name.startswith(BESIDE)
        )

    def model(self) -> nn.Module:
        """The defended model, in eval mode."""
        return self.defence.restore(self.suspect, self.tensors, self.config)


def _of_member(on_step: OnStep, member: int) -> OnOwnStep:
    return lambda log, current: on_step(member, log, current)


def _halfway(state: DefenceState | None, member: int) -> Halfway | None:
    """Where the first configuration that has not ended stood, if its defence kept that."""
    if state is None or member >= len(state.members) or "halfway" not in state.members[member]:
        return None
    prefix = f"{member}/"
    own = {k.removeprefix(prefix): t for k, t in state.tensors.items() if k.startswith(prefix)}
    return Halfway(own, state.members[member]["halfway"])


def _state_of(
    configs: Sequence[DefenceConfig],
    results: Sequence[Any],
    seconds: float,
    halfway: Halfway | None = None,
) -> DefenceState:
    tensors: dict[str, Tensor] = {}
    members = []
    for member, config in enumerate(configs):
        result = results[member] if member < len(results) else None
        about: dict[str, Any] = {"config": config.model_dump(mode="json"), "ended": result is not None}
        about["failure"] = str(result) if isinstance(result, NonFiniteError) else None
        if isinstance(result, Defended):
            tensors |= {f"{member}/{name}": t.cpu().contiguous() for name, t in result.tensors.items()}
            about |= {"numbers": result.numbers, "history": [asdict(step) for step in result.history]}
            about |= {"passes": asdict(result.passes), "seconds": result.seconds}
        if halfway is not None and member == len(results):
            tensors |= {f"{member}/{name}": t for name, t in halfway.tensors.items()}
            about["halfway"] = halfway.about
        members.append(about)
    return DefenceState(tensors, members, seconds)


def with_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model, out of torch.compile and the wrappers of parallel training, that has these
    tensors in place of its own, but for those beside it; in eval mode."""
    cleaned = copied(unwrapped(model)[0])
    given = {name: value for name, value in tensors.items() if not name.startswith(BESIDE)}
    cleaned.load_state_dict({**cleaned.state_dict(), **given})
    return cleaned.eval()
