"""Reconstructive neuron pruning: channels without which an unlearned net recovers its classes.

Li, Lyu, Ma, Koren, Lyu, Li, Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML
2023 (arXiv 2305.14876). Unlearning of clean images leaves a net in which the backdoor stands out;
recovery of them then needs the clean channels alone:

    1. unlearn   max over all weights of the cross-entropy on clean images, until few are right
    2. recover   min over m in [0, 1] of the same, m on the scales of batch norms, weights frozen
    3. prune     in the original net, the scale becomes 0 where m is below a threshold

Use it where the other methods of pruning by masks lose too much accuracy. It costs one pass forward
and one back in each step of 1 and 2. It needs labelled clean images and batch norms with a scale.

Masks begin at 1 and are no part of what unlearns. Gradients are clipped between the backward pass
and the step. The threshold is the last that costs little accuracy on clean images that are held
back, where the published code sweeps it on the test images or fixes it.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.loop import Loop, batches, logits_of, steps_an_epoch
from bimask.defences.pruning.layers import (
    NormMasks,
    ask,
    prune_below,
    share_of,
    to_choose_by,
    with_norms,
    without,
)
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.simple import BEGINNING, Defended, Keeper, OnOwnStep, SimpleDefence
from bimask.masking.copies import copied


class RnpConfig(DefenceConfig):
    """The settings of reconstructive neuron pruning."""

    lr: Annotated[
        float, Field(gt=0, description="of SGD that unlearns"), Search(1e-3, 1e-1, log=True)
    ] = 0.01
    weight_decay: float = Field(5e-4, ge=0, description="of SGD that unlearns")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD, in both phases")
    clip: float = Field(20.0, gt=0, description="largest norm of the gradient that unlearns")
    unlearned: float | None = Field(
        0.2,
        ge=0,
        le=1,
        description="accuracy in an epoch at which unlearning ends, published for ten classes; "
        "of fewer than five, where one class alone is more, it ends with its epochs, as with null",
    )
    mask_lr: Annotated[
        float,
        Field(gt=0, description="of SGD on the masks, which recover"),
        Search(0.02, 0.5, log=True),
    ] = 0.2
    epochs: Annotated[
        int,
        Field(ge=1, description="times that every image is seen: of unlearning at most, of recovery"),
        Search(5, 200, log=True),
    ] = 20
    batch_size: int = Field(128, ge=2, description="images a step; batch norms need two")
    threshold: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="largest of the thresholds 0.05, 0.10, ... below which a mask may be pruned; "
            "BackdoorBench prunes at 0.7",
        ),
        Search(0.05, 0.9),
    ] = 0.9
    # published are 0.02 of the images learned on, and 0.1 for a like sweep (ANP); of 20 images that are
    # held back 0.02 is less than one
    max_drop: float | None = Field(
        0.1,
        ge=0,
        le=1,
        description="share of the accuracy on the images held back that pruning may cost (our choice); "
        "null prunes at `threshold`, and holds none back",
    )
    held_out: float = Field(  # as in ANP
        0.2,
        gt=0,
        lt=1,
        description="share of each class's images that the threshold is chosen by (our choice)",
    )
    shift: int = Field(0, ge=0, description="pixels that images are shifted by at most, anew each step")
    flip: bool = Field(False, description="whether half of the images are flipped, anew each step")

    def steps(self, images: int) -> int:
        """Batches over all epochs of both phases, if unlearning needs all of its epochs."""
        return 2 * self.epochs * steps_an_epoch(images, self.batch_size)


class Rnp(SimpleDefence[RnpConfig]):
    """Reconstructive neuron pruning."""

    name = "rnp"
    config = RnpConfig
    needs_labels = True
    ends_early = True
    numbers = ("pruned_share",)

    def check(self, model: nn.Module, images: Tensor) -> None:
        with_norms(model, images, "RNP")

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: RnpConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[RnpConfig]:
        """Unlearn, recover, prune. Epochs of both phases are what a run goes on from.

        Raises:
            ModelError: the model has no batch norm with a scale.
        """
        original, names = with_norms(model, clean.images, "RNP")
        net = copied(original).train().requires_grad_(True)
        weights = [p for p in net.parameters() if p.is_floating_point()]
        learn, choose = to_choose_by(clean, config.held_out, config.max_drop, generator)
        masks = NormMasks(net, names)
        unlearning = torch.optim.SGD(
            weights, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        recovery = torch.optim.SGD(masks.parameters(), config.mask_lr, momentum=config.momentum)

        def ending() -> tuple[dict[str, Tensor], dict[str, float]]:
            out = prune_below(
                original,
                masks,
                choose,
                highest=config.threshold,
                max_drop=config.max_drop,
                passes=loop.passes,
                learned=learn,
            )
            return without(original, out, "weight"), {"pruned_share": share_of(out)}

        def seen() -> Any:
            return batches(
                learn,
                config.batch_size,
                generator,
                shift=config.shift,
                flip=config.flip,
                dtype=weights[0].dtype,
            )

        with Loop(
            self,
            model,
            config,
            {"net": net, "moments": unlearning, "masks": masks, "mask_moments": recovery},
            ending,
            generator=generator,
            device=clean.images.device,
            keeper=keeper,
        ) as loop:
            for _ in loop.epochs(config.epochs):
                right = 0
                for images, labels in seen():
                    loss, more = unlearn_step(net, unlearning, images, labels, config.clip)
                    right += more
                    loop.passes.add(forward=1, backward=1)
                    if loop.step({"unlearning": loss}, on_step):
                        return loop.result()
                if config.unlearned is not None and right <= config.unlearned * len(learn.images):
                    break
            net.requires_grad_(False)
            for _ in loop.epochs(config.epochs):
                for images, labels in seen():
                    loss = recover_step(net, masks, recovery, images, labels)
                    loop.passes.add(forward=1, backward=1)
                    if loop.step({"recovery": loss}, on_step):
                        return loop.result()
            return loop.result()


def unlearn_step(
    net: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor, clip: float
) -> tuple[float, int]:
    """One step of ascent on the cross-entropy; its negative, and how many are right, before the
    step."""
    optimiser.zero_grad()
    logits = logits_of(net, images)
    loss = -F.cross_entropy(logits, labels)
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimiser.step()
    return float(loss.item()), int((logits.argmax(1) == labels).sum())


def recover_step(
    net: nn.Module,
    masks: NormMasks,
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
) -> float:
    """One step of the masks down the cross-entropy, back into [0, 1]; the loss before it."""
    optimiser.zero_grad()
    loss = F.cross_entropy(ask(net, masks.scaled(net), images), labels)
    loss.backward()
    optimiser.step()
    masks.clamp_()
    return float(loss.item())
