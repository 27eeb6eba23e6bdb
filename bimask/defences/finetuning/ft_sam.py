"""Fine-tuning with sharpness-aware minimisation, on clean images and their labels.

Zhu, Wei, Shen, Fan, Wu, "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
Minimization", ICCV 2023 (arXiv 2304.11823). Every step first moves the weights to where the loss of the
batch is high, by the adaptive perturbation of Kwon et al. (ASAM, ICML 2021, arXiv 2102.11600,
equation 6), and takes the gradient there:

    e = rho T^2 g / ||T g||_2,    g the gradient of the loss at w,    T = |w|
    w <- SGD step along the gradient at w + e

Use it where some hundred labelled images are there, and the suspect was not itself trained with SAM: at
a flat minimum it moves little. It costs twice the passes of plain fine-tuning. It needs labels. The
learning rate follows one cosine over the epochs, where the published program steps it once a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.loop import Loop, batches, cosine, logits_of, set_lr, steps_an_epoch
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.sgd import (
    BatchSize,
    Epochs,
    Flip,
    LearningRate,
    Momentum,
    Shift,
    WeightDecay,
)
from bimask.defences.simple import (
    BEGINNING,
    Defended,
    Keeper,
    OnOwnStep,
    SimpleDefence,
)
from bimask.nets.admission import admit


class FtSamConfig(DefenceConfig):
    """The settings of FT-SAM; the learning rate follows a cosine to 0 over the epochs."""

    lr: LearningRate = 0.01
    rho: Annotated[
        float,
        Field(ge=0, description="size of the adaptive perturbation; 0 is plain fine-tuning"),
        Search(0.5, 4.0),
    ] = 2.0
    epochs: Epochs = 100
    batch_size: BatchSize = 256
    momentum: Momentum = 0.9
    weight_decay: WeightDecay = 5e-4
    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="share of a label spread over all classes"
    )
    shift: Shift = 0
    flip: Flip = False

    def steps(self, images: int) -> int:
        """Batches over all epochs."""
        return self.epochs * steps_an_epoch(images, self.batch_size)


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
        net = admit(model, clean.images).model.train().requires_grad_(True)
        weights = [p for p in net.parameters() if p.is_floating_point()]
        optimiser = torch.optim.SGD(
            weights, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        with Loop(
            self,
            model,
            config,
            {"net": net, "moments": optimiser},
            lambda: (net.state_dict(), {}),
            generator=generator,
            device=clean.images.device,
            keeper=keeper,
        ) as loop:
            for epoch in loop.epochs(config.epochs):
                set_lr(optimiser, config.lr * cosine(epoch, config.epochs))
                for images, labels in batches(
                    clean,
                    config.batch_size,
                    generator,
                    shift=config.shift,
                    flip=config.flip,
                    dtype=weights[0].dtype,
                ):

                    def loss_of(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                        return F.cross_entropy(
                            logits_of(net, images), labels, label_smoothing=config.label_smoothing
                        )

                    loss = sam_step(net, optimiser, loss_of, config.rho).item()
                    loop.passes.add(forward=2, backward=2)
                    if loop.step({"cross_entropy": loss}, on_step):
                        return loop.result()
            return loop.result()


def sam_step(net: nn.Module, optimiser: torch.optim.Optimizer, loss_of: Any, rho: float) -> Tensor:
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
    found: Tensor = loss.detach()
    return found


def perturbation(
    weights: Sequence[Tensor], gradients: Sequence[Tensor | None], rho: float
) -> list[Tensor]:
    """e = rho T^2 g / ||T g||_2 over all weights together, T = |w|; 0 where no gradient is."""
    known = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    norm = torch.stack([(w.abs() * g).norm() for w, g in zip(weights, known, strict=True)]).norm()
    scale = rho / norm.clamp_min(1e-12)
    return [w.square() * g * scale for w, g in zip(weights, known, strict=True)]


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
