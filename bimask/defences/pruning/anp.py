"""Adversarial neuron pruning: channels that make the net err when they are disturbed.

Wu, Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021 (arXiv
2110.14430). A backdoored net errs towards its target sooner than a clean one when the scale w and
the shift b of its channels are disturbed. Every batch norm has a mask m, 1 at first, that learns to
keep the net right both as it is and under the worst disturbance:

    min over m in [0, 1]    alpha L(m w, b) + (1 - alpha) max L((m + d) w, (1 + x) b)
                                                          d, x in [-eps, eps]

L is the cross-entropy on clean images. The inner problem starts at random and takes one step along
the sign of the gradient; the outer one is a step of SGD. At last w becomes 0 where m
is below a threshold.

Use it where a few channels carry the backdoor, and where their removal is to leave all others as
they are. It costs three passes forward and three back in each iteration. It needs labelled clean
images and batch norms with a scale.

The threshold is the last that costs little accuracy on clean images that are held back. Published
programs take it from the test images, and some from the attack success there. The disturbance is
put back into [-eps, eps] after every step, as the equation says. b stays, since m does not act on
it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.loop import Loop, iterations
from bimask.defences.pruning.layers import (
    NormMasks,
    ask,
    freeze_statistics,
    prune_below,
    share_of,
    to_choose_by,
    with_norms,
    without,
)
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.simple import BEGINNING, Defended, Keeper, OnOwnStep, SimpleDefence


class AnpConfig(DefenceConfig):
    """The settings of adversarial neuron pruning."""

    mask_lr: Annotated[
        float,
        Field(gt=0, description="of SGD on the masks; 0.2 is the authors', 0.01 BackdoorBench's"),
        Search(0.01, 0.5, log=True),
    ] = 0.2
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD on the masks")
    iterations: Annotated[
        int, Field(ge=1, description="batches that the masks learn on"), Search(100, 2000, log=True)
    ] = 2000
    batch_size: int = Field(128, ge=2, description="images an iteration; batch norms need two")
    eps: Annotated[
        float,
        Field(ge=0, description="largest disturbance, as a share of a channel's scale and shift"),
        Search(0.1, 0.6),
    ] = 0.4
    ascent_steps: int = Field(1, ge=1, description="steps of eps / ascent_steps to the disturbance")
    alpha: Annotated[
        float,
        Field(ge=0, le=1, description="weight of the loss without a disturbance"),
        Search(0.01, 0.99),
    ] = 0.2
    threshold: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="largest of the thresholds 0.05, 0.10, ... below which a mask may be pruned",
        ),
        Search(0.05, 0.9),
    ] = 0.9
    max_drop: float | None = Field(
        0.1,
        ge=0,
        le=1,
        description="share of the accuracy on the images held back that pruning may cost; null prunes "
        "at `threshold`, and holds none back",
    )
    # BackdoorBench's 5 % are 1 of 20 images a class; with 10 a class a tenth is too coarse a measure
    held_out: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of each class's images that the threshold is chosen by (our choice)",
    )
    shift: int = Field(0, ge=0, description="pixels that images are shifted by at most, anew each step")
    flip: bool = Field(False, description="whether half of the images are flipped, anew each step")

    def steps(self, images: int) -> int:
        """The iterations."""
        return self.iterations


class Anp(SimpleDefence[AnpConfig]):
    """Adversarial neuron pruning."""

    name = "anp"
    config = AnpConfig
    needs_labels = True
    numbers = ("pruned_share",)

    def check(self, model: nn.Module, images: Tensor) -> None:
        with_norms(model, images, "ANP")

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: AnpConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[AnpConfig]:
        """Learn masks, and prune by them. Epochs are what a run goes on from.

        Raises:
            ModelError: the model has no batch norm with a scale.
        """
        net, names = with_norms(model, clean.images, "ANP")
        net.train().requires_grad_(False)
        freeze_statistics(net)
        learn, choose = to_choose_by(clean, config.held_out, config.max_drop, generator)
        masks = NormMasks(net, names)
        optimiser = torch.optim.SGD(masks.parameters(), config.mask_lr, momentum=config.momentum)

        def ending() -> tuple[dict[str, Tensor], dict[str, float]]:
            out = prune_below(
                net,
                masks,
                choose,
                highest=config.threshold,
                max_drop=config.max_drop,
                passes=loop.passes,
                learned=learn,
            )
            return without(net, out, "weight"), {"pruned_share": share_of(out)}

        with Loop(
            self,
            model,
            config,
            {"masks": masks, "moments": optimiser},
            ending,
            generator=generator,
            device=clean.images.device,
            keeper=keeper,
        ) as loop:
            for _, images, labels in iterations(
                loop,
                config.iterations,
                learn,
                config.batch_size,
                generator,
                shift=config.shift,
                flip=config.flip,
                dtype=masks.values[0].dtype,
            ):
                losses = mask_step(net, masks, optimiser, images, labels, config, generator)
                loop.passes.add(forward=config.ascent_steps + 2, backward=config.ascent_steps + 2)
                if loop.step(losses, on_step):
                    break
            return loop.result()


def mask_step(
    net: nn.Module,
    masks: NormMasks,
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    config: AnpConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    """One step of the masks, back into [0, 1]; the terms of the loss with their weights."""
    shifts = [net.get_submodule(name).bias for name in masks.names]

    def loss_under(noise: Sequence[Tensor]) -> Tensor:
        tensors = masks.scaled(net, noise[: len(shifts)])
        for name, shift, share in zip(masks.names, shifts, noise[len(shifts) :], strict=True):
            if isinstance(shift, Tensor):
                tensors[f"{name}.bias"] = shift * (1 + share)
        return F.cross_entropy(ask(net, tensors, images), labels)

    start = [
        torch.empty(mask.shape, dtype=mask.dtype).uniform_(-1, 1, generator=generator).to(mask.device)
        for mask in [*masks.values, *masks.values]
    ]
    noise = ascend(loss_under, [config.eps * s for s in start], config.eps, config.ascent_steps)
    natural = config.alpha * F.cross_entropy(ask(net, masks.scaled(net), images), labels)
    disturbed = (1 - config.alpha) * loss_under(noise)
    optimiser.zero_grad()
    (natural + disturbed).backward()
    optimiser.step()
    masks.clamp_()
    return {"natural": natural.item(), "disturbed": disturbed.item()}


def ascend(
    loss_under: Callable[[Sequence[Tensor]], Tensor], start: Sequence[Tensor], eps: float, steps: int
) -> list[Tensor]:
    """The disturbance in [-eps, eps] after so many steps of eps / steps along the signs of its
    gradient."""
    noise = list(start)
    for _ in range(steps):
        noise = [n.detach().requires_grad_() for n in noise]
        slopes = torch.autograd.grad(loss_under(noise), noise, materialize_grads=True)
        noise = [
            (n + eps / steps * slope.sign()).clamp(-eps, eps)
            for n, slope in zip(noise, slopes, strict=True)
        ]
    return [n.detach() for n in noise]
