"""Fine-tuning with sharpness-aware minimisation, on clean images and their labels.

Zhu, Wei, Shen, Fan, Wu, "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
Minimization", ICCV 2023 (arXiv 2304.11823). Every step first moves the weights to where the loss of the
batch is high, by the adaptive perturbation of Kwon et al. (ASAM, ICML 2021, arXiv 2102.11600,
equation 6), and takes the gradient there:

    e = rho T^2 g / ||T g||_2,    g the gradient of the loss at w,    T = |w|
    w <- SGD step along the gradient at w + e
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.data import augment
from bimask.defences.base import CleanData, Passes
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.simple import (
    BEGINNING,
    Defended,
    Halfway,
    Keeper,
    OnOwnStep,
    SimpleDefence,
    Step,
    with_tensors,
)
from bimask.devices import upload
from bimask.errors import ModelError, NonFiniteError
from bimask.files.moments import below, moments_of, prefixed, put_moments
from bimask.nets.admission import admit


class FtSamConfig(DefenceConfig):
    """The settings of FT-SAM; the learning rate follows a cosine to 0 over the epochs."""

    lr: Annotated[
        float, Field(gt=0, description="of SGD, in the first epoch"), Search(1e-4, 1e-1, log=True)
    ] = 0.01
    rho: Annotated[
        float,
        Field(ge=0, description="size of the adaptive perturbation; 0 is plain fine-tuning"),
        Search(0.5, 4.0),
    ] = 2.0
    epochs: Annotated[
        int, Field(ge=1, description="times that every image is seen"), Search(5, 200, log=True)
    ] = 100
    batch_size: int = Field(256, ge=2, description="images a step; batch norms need two")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="of SGD")
    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="share of a label spread over all classes"
    )
    shift: int = Field(0, ge=0, description="pixels that images are shifted by at most, anew each step")
    flip: bool = Field(False, description="whether half of the images are flipped, anew each step")

    def steps(self, images: int) -> int:
        """Batches over all epochs."""
        return self.epochs * len(_batches(images, self.batch_size, torch.Generator()))


class FtSam(SimpleDefence[FtSamConfig]):
    """Fine-tuning with sharpness-aware minimisation."""

    name = "ft_sam"
    config = FtSamConfig
    needs_labels = True

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: FtSamConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[FtSamConfig]:
        """Fine-tune all weights; batch norms learn, too, but count each batch once. Epochs are what a
        run goes on from."""
        began = time.perf_counter()
        assert clean.labels is not None
        net = admit(model, clean.images).model.train().requires_grad_(True)
        weights = [p for p in net.parameters() if p.is_floating_point()]
        optimiser = torch.optim.SGD(
            weights, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        history: list[Step] = []
        passes = Passes()
        first = 0

        def current() -> Defended[FtSamConfig]:
            state = {
                name: value.detach().clone(memory_format=torch.contiguous_format)
                for name, value in net.state_dict().items()
            }
            if not all(bool(v.isfinite().all()) for v in state.values() if v.is_floating_point()):
                raise NonFiniteError(
                    f"Weights not finite after step {len(history) - 1}; lower `lr` or `rho`."
                )
            spent = time.perf_counter() - began
            return Defended(self, model, config, state, {}, tuple(history), passes, spent)

        with _seeded(generator, clean.images.device) as random:
            if keeper.begun is not None:
                tensors, about = keeper.begun.tensors, keeper.begun.about
                net.load_state_dict(below("net", tensors))
                put_moments(optimiser, below("moments", tensors))
                random.put(below("random", tensors))
                history += [Step(**step) for step in about["history"]]
                passes, first = Passes(**about["passes"]), about["epochs"]
                began -= about["seconds"]

            def taken(epochs: int) -> Halfway:
                own = {name: value.detach().cpu().clone() for name, value in net.state_dict().items()}
                tensors = {
                    **prefixed("net", own),
                    **prefixed("moments", {k: t.cpu() for k, t in moments_of(optimiser).items()}),
                    **prefixed("random", random.taken()),
                }
                about = {"epochs": epochs, "passes": asdict(passes)}
                about |= {"history": [asdict(step) for step in history]}
                about |= {"seconds": time.perf_counter() - began}
                return Halfway({name: t.contiguous() for name, t in tensors.items()}, about)

            for epoch in range(first, config.epochs):
                cosine = (1 + math.cos(math.pi * epoch / config.epochs)) / 2
                optimiser.param_groups[0]["lr"] = config.lr * cosine
                for batch in _batches(len(clean.images), config.batch_size, generator):
                    index = upload(batch, clean.images)
                    images = augment(
                        clean.images[index], shift=config.shift, flip=config.flip, generator=generator
                    ).to(weights[0].dtype)
                    labels = clean.labels[index]

                    def loss_of(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                        logits = net(images)
                        if not isinstance(logits, Tensor):
                            raise ModelError(
                                f"In training mode the model answers with a {type(logits).__name__}, "
                                "but logits are expected; switch its auxiliary outputs off."
                            )
                        return F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)

                    loss = sam_step(net, optimiser, loss_of, config.rho)
                    passes.add(forward=2, backward=2)
                    if not math.isfinite(loss):
                        raise NonFiniteError(
                            f"Loss not finite in step {len(history)}: {loss}; lower `lr` or `rho`."
                        )
                    history.append(Step(len(history), {"cross_entropy": loss}, loss))
                    if on_step is not None and on_step(history[-1], current):
                        return current()
                keeper.keep(partial(taken, epoch + 1))
        return current()

    def restore(
        self, model: nn.Module, tensors: Mapping[str, Tensor], config: FtSamConfig
    ) -> nn.Module:
        """A copy of the model with these weights."""
        return with_tensors(model, tensors)


def sam_step(net: nn.Module, optimiser: torch.optim.Optimizer, loss_of: Any, rho: float) -> float:
    """One step of the optimiser along the gradient at w + e; the loss at w."""
    weights = [p for group in optimiser.param_groups for p in group["params"]]
    optimiser.zero_grad()
    loss = loss_of()
    loss.backward()
    moves = perturbation([p.detach() for p in weights], [p.grad for p in weights], rho)
    with torch.no_grad():
        for weight, move in zip(weights, moves, strict=True):
            weight.add_(move)
    optimiser.zero_grad()
    with _frozen_statistics(net):
        loss_of().backward()
    with torch.no_grad():
        for weight, move in zip(weights, moves, strict=True):
            weight.sub_(move)
    optimiser.step()
    return float(loss.item())


def perturbation(
    weights: Sequence[Tensor], gradients: Sequence[Tensor | None], rho: float
) -> list[Tensor]:
    """e = rho T^2 g / ||T g||_2 over all weights together, T = |w|; 0 where no gradient is."""
    known = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    norm = torch.stack([(w.abs() * g).norm() for w, g in zip(weights, known, strict=True)]).norm()
    scale = rho / norm.clamp_min(1e-12)
    return [w.square() * g * scale for w, g in zip(weights, known, strict=True)]


def _batches(count: int, size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """All images once, in a new order; one alone, of which no batch norm can learn, joins the last."""
    parts = list(torch.randperm(count, generator=generator).split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


@dataclass(frozen=True)
class _Random:
    """What a run draws from: its own generator, and torch's, which dropout takes."""

    generator: torch.Generator
    device: torch.device

    def taken(self) -> dict[str, Tensor]:
        states = {"own": self.generator.get_state(), "torch": torch.random.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def put(self, states: Mapping[str, Tensor]) -> None:
        self.generator.set_state(states["own"])
        torch.random.set_rng_state(states["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)


@contextmanager
def _seeded(generator: torch.Generator, device: torch.device) -> Iterator[_Random]:
    """torch's own generators are seeded by the run's, and put back after it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        yield _Random(generator, device)


@contextmanager
def _frozen_statistics(net: nn.Module) -> Iterator[None]:
    """Running statistics of batch norms stay as they are: the second pass sees the same batch."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counts = [None if n.num_batches_tracked is None else n.num_batches_tracked.clone() for n in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)
