"""The steps of a defence that trains: their log, and where a run goes on that was cut short.

A `Loop` keeps what a run needs to go on with the same bits: the modules and optimisers that it names,
its own generator and torch's (dropout draws from it), the history, the passes and the seconds.

    with Loop(self, model, config, parts, ending, generator=generator, keeper=keeper) as loop:
        for epoch in loop.epochs(config.epochs):
            for images, labels in batches(clean, config.batch_size, generator):
                ...
                if loop.step({"cross_entropy": loss}, on_step):
                    return loop.result()
        return loop.result()

A method of several phases calls `epochs` once for each; those behind a run that goes on are not run
again. What lies between two phases is, and must give the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from types import TracebackType
from typing import Any, Generic

import torch
from torch import Tensor, nn
from typing_extensions import Self

from bimask.data import augment
from bimask.defences.base import CleanData, Config, Defence, Passes
from bimask.defences.simple import BEGINNING, Defended, Halfway, Keeper, OnOwnStep, Step
from bimask.devices import upload
from bimask.errors import ModelError, NonFiniteError
from bimask.files.moments import below, moments_of, prefixed, put_moments

Part = nn.Module | torch.optim.Optimizer
Ending = Callable[[], "tuple[dict[str, Tensor], dict[str, float]]"]


class Loop(Generic[Config]):
    """The steps of one configuration.

    Attributes:
        history: the steps so far.
        passes: of a batch through the network; the defence adds to it.
    """

    def __init__(
        self,
        defence: Defence[Config],
        suspect: nn.Module,
        config: Config,
        parts: Mapping[str, Part],
        ending: Ending,
        *,
        generator: torch.Generator,
        device: torch.device,
        keeper: Keeper = BEGINNING,
    ) -> None:
        """
        Args:
            parts: whatever changes from epoch to epoch, by a name of this run's own.
            ending: the tensors and numbers that the run would end with now.
            generator: CPU; all draws of the run come from it.
        """
        self.history: list[Step] = []
        self.passes = Passes()
        self._defence, self._suspect, self._config = defence, suspect, config
        self._parts, self._ending, self._keeper = dict(parts), ending, keeper
        self._generator, self._device = generator, device
        self._began = time.perf_counter()
        self._asked = self._done = 0  # epochs of the phases so far; epochs behind a run that goes on
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        devices = [self._device] if self._device.type == "cuda" else []
        self._stack.enter_context(torch.random.fork_rng(devices=devices))
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=self._generator)))
        if self._keeper.begun is not None:
            self._put(self._keeper.begun)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def epochs(self, count: int) -> Iterator[int]:
        """The epochs of a phase that are still to be run, from 0; after each there is a place to go on
        from."""
        first = self._asked
        self._asked += count
        for epoch in range(max(0, self._done - first), count):
            yield epoch
            self._keeper.keep(partial(self._taken, first + epoch + 1))

    def step(self, losses: Mapping[str, float], on_step: OnOwnStep | None = None) -> bool:
        """Log a step; whether the run is to end here.

        Args:
            losses: the terms of the loss, each with its weight.

        Raises:
            NonFiniteError: one of them is NaN or infinite.
        """
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            raise NonFiniteError(
                f"The loss {bad[0]} is not finite in step {len(self.history)}: {losses[bad[0]]}; lower "
                "the learning rate."
            )
        self.history.append(Step(len(self.history), dict(losses), sum(losses.values())))
        return on_step is not None and bool(on_step(self.history[-1], self.result))

    def result(self) -> Defended[Config]:
        """What the run ends with now.

        Raises:
            NonFiniteError: a tensor of it is not finite.
        """
        before = Passes(self.passes.forward, self.passes.backward)
        tensors, numbers = self._ending()
        spent, self.passes = self.passes, before  # whoever looks on the way costs the run nothing
        tensors = {
            name: value.detach().clone(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        for name, value in tensors.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise NonFiniteError(
                    f"{name} is not finite after step {len(self.history) - 1}; lower the learning rate."
                )
        return Defended(
            self._defence,
            self._suspect,
            self._config,
            tensors,
            numbers,
            tuple(self.history),
            spent,
            time.perf_counter() - self._began,
        )

    def _taken(self, epochs: int) -> Halfway:
        tensors = prefixed("random", self._random())
        for name, part in self._parts.items():
            own = part.state_dict() if isinstance(part, nn.Module) else moments_of(part)
            tensors |= prefixed(name, own)
        about = {
            "epochs": epochs,
            "passes": asdict(self.passes),
            "history": [asdict(step) for step in self.history],
            "seconds": time.perf_counter() - self._began,
        }
        return Halfway({k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}, about)

    def _put(self, begun: Halfway) -> None:
        for name, part in self._parts.items():
            own = below(name, begun.tensors)
            if isinstance(part, nn.Module):
                part.load_state_dict(own)
            else:
                put_moments(part, own)
        random = below("random", begun.tensors)
        self._generator.set_state(random["own"])
        torch.random.set_rng_state(random["torch"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self._device)
        self.history += [Step(**step) for step in begun.about["history"]]
        self.passes, self._done = Passes(**begun.about["passes"]), begun.about["epochs"]
        self._began -= begun.about["seconds"]

    def _random(self) -> dict[str, Tensor]:
        states = {"own": self._generator.get_state(), "torch": torch.random.get_rng_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return states


def batches(
    clean: CleanData,
    size: int,
    generator: torch.Generator,
    *,
    shift: int = 0,
    flip: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once, in a new order: images (B, C, H, W) in [0, 1] and labels (B,). One image alone,
    of which no batch norm can learn, joins the last batch. Labels are zeros where there are none.

    Args:
        shift: pixels that images are shifted by at most, anew in each batch.
        flip: whether half of the images are flipped, anew in each batch.
    """
    for rows in shuffled(len(clean.images), size, generator):
        index = upload(rows, clean.images)
        images = augment(clean.images[index], shift=shift, flip=flip, generator=generator).to(dtype)
        yield images, torch.zeros_like(index) if clean.labels is None else clean.labels[index]


def iterations(
    loop: Loop[Any],
    count: int,
    clean: CleanData,
    size: int,
    generator: torch.Generator,
    *,
    shift: int = 0,
    flip: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """So many `batches`, epoch after epoch of the loop: number from 0, images and labels."""
    an_epoch = steps_an_epoch(len(clean.images), size)
    for epoch in loop.epochs(math.ceil(count / an_epoch)):
        numbers = range(epoch * an_epoch, min(count, (epoch + 1) * an_epoch))
        seen = batches(clean, size, generator, shift=shift, flip=flip, dtype=dtype)
        for number, (images, labels) in zip(numbers, seen, strict=False):
            yield number, images, labels


def shuffled(count: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """The rows of every batch of an epoch."""
    parts = list(torch.randperm(count, generator=generator).split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def steps_an_epoch(images: int, size: int) -> int:
    """How many batches an epoch of `batches` has."""
    return len(shuffled(images, size, torch.Generator()))


def logits_of(net: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """(N, K), also of a net in training mode.

    Raises:
        ModelError: it answers otherwise there.
    """
    logits = net(images)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"In training mode the model answers with a {type(logits).__name__}, but logits are "
            "expected; switch its auxiliary outputs off."
        )
    return logits


def inside(images: Tensor) -> Tensor:
    """Images put into [0, 1]; the gradient passes at 0 and 1, where `clamp` of newer torch stops it.

    What begins at the images themselves would never move where these are black or white.
    """
    return torch.where((images >= 0) & (images <= 1), images, images.detach().clamp(0, 1))


def cosine(epoch: int, epochs: int) -> float:
    """The share of the first learning rate in an epoch from 0: a half cosine from 1 to 0."""
    return (1 + math.cos(math.pi * epoch / epochs)) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all parameters of an optimiser this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
