"""Shared adversarial unlearning: forget the mistakes that the suspect and the defended net share.

Wei, Zhang, Zha, Wu, "Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared
Adversarial Examples", NeurIPS 2023 (arXiv 2307.10562). A poisoned image is an adversarial example of
the suspect f; while the backdoor lasts, it is one of the defended net g, too, with the same wrong
label. So every step searches such images, and pushes g away from the suspect's answer there. With
p, q the probabilities of g and f, and y the label:

    inner   minimise over |d| <= r   -a (CE(g(x + d), y) + CE(f(x + d), y)) + b JS(p, q)
            where a CE counts while its net is right, and JS until both are wrong alike
    outer   c CE(g(x), y) + e CE(g(x + d), y) - s log(1 - p_w),   w = argmax f(x + d), where w != y

The inner problem is solved by sign steps that begin at d = +r; the outer step is one of Adam.

Use it on triggers of bounded strength: it is known to fail where a trigger changes pixels by more
than the radius.
It costs twelve passes and more a step, so about twelve times what plain fine-tuning costs.
It needs labels, and nothing of the architecture.

The perturbed images are kept in [0, 1]. Batch norms answer with their running statistics throughout
(the published program lets them learn): perturbed images would move the statistics that clean images
are answered with, and few images give poor ones.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.loop import Loop, batches, logits_of, steps_an_epoch
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.sgd import BatchSize, Epochs, Flip, Shift, weights_of
from bimask.defences.simple import (
    BEGINNING,
    Defended,
    Keeper,
    OnOwnStep,
    SimpleDefence,
)
from bimask.defences.unlearning.losses import minus_log_other
from bimask.masking.copies import copied
from bimask.nets.admission import admit


class SauConfig(DefenceConfig):
    """The settings of SAU: published for CIFAR-10 and GTSRB, with 5 % of the training images."""

    lr: Annotated[float, Field(gt=0, description="of Adam"), Search(1e-5, 1e-2, log=True)] = 1e-4
    epochs: Epochs = 100
    batch_size: BatchSize = 256
    budget: Annotated[
        float,
        Field(gt=0, description="r, the largest change of a pixel, of images in [0, 1]"),
        Search(0.05, 0.4),
    ] = 0.2
    inner_steps: Annotated[
        int, Field(ge=1, description="sign steps of the inner problem"), Search(1, 10)
    ] = 5
    inner_lr: float | None = Field(
        None, gt=0, description="change of a pixel by one sign step; null is the budget, as published"
    )
    adversarial_weight: float = Field(0.01, ge=0, description="a, of the inner cross-entropies")
    divergence_weight: float = Field(1.0, ge=0, description="b, of the inner JS divergence")
    clean_weight: float = Field(1.0, ge=0, description="c, of the cross-entropy of clean images")
    robust_weight: float = Field(0.0, ge=0, description="e, of the cross-entropy of perturbed images")
    shared_weight: Annotated[
        float, Field(ge=0, description="s, of the push from shared mistakes"), Search(0.1, 10, log=True)
    ] = 1.0
    shift: Shift = 0
    flip: Flip = False

    def steps(self, images: int) -> int:
        """Batches over all epochs."""
        return self.epochs * steps_an_epoch(images, self.batch_size)


class Sau(SimpleDefence[SauConfig]):
    """Shared adversarial unlearning."""

    name = "sau"
    config = SauConfig
    needs_labels = True

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: SauConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[SauConfig]:
        """Train all weights, and compare with the suspect as it was. Epochs are what a run goes on
        from."""
        net = admit(model, clean.images).model
        suspect = copied(net).requires_grad_(False)
        weights = weights_of(net.requires_grad_(True))
        optimiser = torch.optim.Adam(weights, config.lr)
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
            for _ in loop.epochs(config.epochs):
                for images, labels in batches(
                    clean,
                    config.batch_size,
                    generator,
                    shift=config.shift,
                    flip=config.flip,
                    dtype=weights[0].dtype,
                ):
                    moved = shared_adversarial(net, suspect, images, labels, config)
                    own, perturbed = logits_of(net, torch.cat([images, moved])).chunk(2)
                    with torch.no_grad():
                        theirs = logits_of(suspect, moved)
                    losses = outer_losses(own, perturbed, theirs, labels, config)
                    optimiser.zero_grad()
                    torch.stack(list(losses.values())).sum().backward()
                    optimiser.step()
                    searched = 2 * config.inner_steps
                    loop.passes.add(forward=searched + 3, backward=searched + 2)
                    if loop.step({name: loss.item() for name, loss in losses.items()}, on_step):
                        return loop.result()
            return loop.result()


def shared_adversarial(
    net: nn.Module, suspect: nn.Module, images: Tensor, labels: Tensor, config: SauConfig
) -> Tensor:
    """Images (N, C, H, W) in [0, 1], at most `budget` from the given ones, that both nets answer alike
    and wrongly, as far as the sign steps get."""
    low, high = (images - config.budget).clamp_min(0), (images + config.budget).clamp_max(1)
    step = config.budget if config.inner_lr is None else config.inner_lr
    moved = high
    for _ in range(config.inner_steps):
        moved = moved.detach().requires_grad_()
        loss = inner_objective(
            logits_of(net, moved),
            logits_of(suspect, moved),
            labels,
            config.adversarial_weight,
            config.divergence_weight,
        )
        (slope,) = torch.autograd.grad(loss, moved)
        moved = torch.maximum(torch.minimum(moved - step * slope.sign(), high), low)
    return moved.detach()


def inner_objective(
    own: Tensor, theirs: Tensor, labels: Tensor, adversarial_weight: float, divergence_weight: float
) -> Tensor:
    """What the perturbation minimises, summed over images: a sign step is the same for any mean.

    Args:
        own, theirs: logits (N, K) of the net and of the suspect.
        labels: (N,), the true ones.
    """
    wrong, misled = own.argmax(1) != labels, theirs.argmax(1) != labels
    shared = wrong & misled & (own.argmax(1) == theirs.argmax(1))
    right = F.cross_entropy(own, labels, reduction="none") * ~wrong
    kept = F.cross_entropy(theirs, labels, reduction="none") * ~misled
    apart = js_divergence(own, theirs) * ~shared
    return (divergence_weight * apart - adversarial_weight * (right + kept)).sum()


def js_divergence(one: Tensor, other: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of rows of probabilities, given as logits (N, K): (N,), in nats, in
    [0, log 2]."""
    p, q = F.log_softmax(one, 1), F.log_softmax(other, 1)
    middle = torch.logaddexp(p, q) - torch.log(p.new_tensor(2.0))
    return ((p.exp() * (p - middle)).sum(1) + (q.exp() * (q - middle)).sum(1)) / 2


def outer_losses(
    own: Tensor, perturbed: Tensor, theirs: Tensor, labels: Tensor, config: SauConfig
) -> dict[str, Tensor]:
    """The terms that the net's weights minimise, each a mean over the batch, with its weight.

    Args:
        own, perturbed: logits (N, K) of the net, of clean and of perturbed images.
        theirs: the suspect's of the perturbed ones.
    """
    wrong = theirs.argmax(1)
    push = minus_log_other(perturbed, wrong) * (wrong != labels)
    return {
        "cross_entropy": config.clean_weight * F.cross_entropy(own, labels),
        "robust_cross_entropy": config.robust_weight * F.cross_entropy(perturbed, labels),
        "shared": config.shared_weight * push.mean(),
    }
