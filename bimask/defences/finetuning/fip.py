"""Fisher information guided purification: fine-tuning towards a flat minimum that is near.

Karim, Al Arafat, Rakin, Guo, Rahnavard, "Fisher Information guided Purification against Backdoor
Attacks", CCS 2024 (arXiv 2409.00863). A backdoor makes the minimum sharp. So the loss of clean images
has the trace of the Fisher matrix F, which is small where the minimum is flat; and weights that F0, of
the suspect, says are needed for clean images shall stay where they are:

    CE(f_w(x), y) + eta_F Tr F(w) + eta_r / 2 sum_j (F0)_jj (w_j - w0_j)^2,
    F(w) = mean of g g^T,    g = gradient by w of log p_w(y | x) of one image

For the trace no image is asked alone: with a sign s_i = +1 or -1 drawn for every image of a batch of B,
the mean of ||gradient of sum_i s_i log p(y_i | x_i)||^2 / B over the draws is Tr F. F0 is the mean over
all images, each alone, of the suspect in eval mode.

Use it where plain fine-tuning leaves the backdoor and accuracy must stay. It costs one pass forward and
three back of every image an epoch, and at first one forward and back of every image alone. It needs
labels, layers that can be derived twice, and images that the model does not answer by heart: where it
does, the trace is 0 already, so published runs shift and flip images, as `shift` and `flip` do.

Otherwise than in the published code, which multiplies one gradient of the batch by normal draws in
place of the trace, so that its term has mean 0; takes the logits of every label for every image;
squares the mean gradient in place of the mean of squares for F0; and leaves the last term out. The
trace is there in every step, not in every fifth. Fast FIP, which learns singular values alone, is not
built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bimask.defences.base import CleanData
from bimask.defences.loop import Loop, logits_of
from bimask.defences.settings import Search
from bimask.defences.sgd import (
    BatchSize,
    FineTuningConfig,
    Momentum,
    WeightDecay,
    descend,
    epoch_of,
    sgd,
    weights_of,
)
from bimask.defences.simple import (
    BEGINNING,
    Defended,
    Keeper,
    OnOwnStep,
    SimpleDefence,
)
from bimask.devices import upload
from bimask.nets.admission import admit


class FipConfig(FineTuningConfig):
    """The settings of FIP, as in its code; the learning rate stays the same."""

    lr: Annotated[
        float, Field(gt=0, description="of SGD, in every epoch"), Search(1e-4, 1e-1, log=True)
    ] = 0.005
    # 2,000 steps of 128 images on 500 images, 1 % of CIFAR-10, are 512 epochs
    epochs: Annotated[
        int, Field(ge=1, description="times that every image is seen"), Search(20, 1000, log=True)
    ] = 500
    batch_size: BatchSize = 128
    momentum: Momentum = 0.95
    weight_decay: WeightDecay = 0.0
    trace_weight: Annotated[
        float,
        Field(
            ge=0,
            description="eta_F, weight of the trace of the Fisher matrix: 0.01 in the published class, "
            "0.5 in the script that runs it",
        ),
        Search(1e-4, 0.5, log=True),
    ] = 0.01
    drift_weight: Annotated[
        float,
        Field(ge=0, description="eta_r, weight of how far the weights have come, by the Fisher matrix"),
        Search(0.1, 100, log=True),
    ] = 5.0


class Fip(SimpleDefence[FipConfig]):
    """Fisher information guided purification."""

    name = "fip"
    config = FipConfig
    needs_labels = True

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: FipConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[FipConfig]:
        """Fine-tune all weights; batch norms learn, too."""
        net = admit(model, clean.images).model.requires_grad_(True)
        weights = weights_of(net)
        before = [weight.detach().clone() for weight in weights]
        needed = fisher_diagonal(net, clean)
        net.train()
        optimiser = sgd(net, config)
        with (
            Loop(
                self,
                model,
                config,
                {"net": net, "moments": optimiser},
                lambda: (net.state_dict(), {}),
                generator=generator,
                device=clean.images.device,
                keeper=keeper,
            ) as loop,
            sdpa_kernel(SDPBackend.MATH),  # the one kernel of attention that can be derived twice
        ):
            for epoch in loop.epochs(config.epochs):
                if epoch == 0:
                    loop.passes.add(forward=len(clean.images), backward=len(clean.images))
                for images, labels in epoch_of(clean, config, generator, net):
                    logits = logits_of(net, images)
                    signs = 2 * torch.randint(2, labels.shape, generator=generator) - 1
                    trace = fisher_trace(logits, labels, weights, upload(signs, logits))
                    terms = {
                        "cross_entropy": F.cross_entropy(logits, labels),
                        "trace": config.trace_weight * trace,
                        "drift": config.drift_weight * drift(weights, before, needed),
                    }
                    descend(optimiser, torch.stack(list(terms.values())).sum())
                    loop.passes.add(forward=1, backward=3)
                    if loop.step({name: term.item() for name, term in terms.items()}, on_step):
                        return loop.result()
            return loop.result()


def fisher_trace(logits: Tensor, labels: Tensor, weights: Sequence[Tensor], signs: Tensor) -> Tensor:
    """An estimate of Tr F over a batch, whose mean over all signs is exact; it can be derived.

    Args:
        logits, labels: (B, K) and (B,).
        weights: that the logits were computed with.
        signs: (B,) of +1 and -1.
    """
    likelihood = -F.cross_entropy(logits, labels, reduction="none")
    gradients = torch.autograd.grad(
        (signs * likelihood).sum(), list(weights), create_graph=True, allow_unused=True
    )
    squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
    return torch.stack(squares).sum() / len(labels)


def fisher_diagonal(net: nn.Module, clean: CleanData) -> list[Tensor]:
    """The diagonal of F over all images, each asked alone, in the form of `weights_of(net)`.

    Args:
        net: in eval mode.
    """
    weights = weights_of(net)
    found = [torch.zeros_like(weight) for weight in weights]
    assert clean.labels is not None
    for image, label in zip(
        clean.images.to(weights[0].dtype).split(1), clean.labels.split(1), strict=True
    ):
        loss = F.cross_entropy(net(image), label)
        for total, gradient in zip(
            found, torch.autograd.grad(loss, weights, allow_unused=True), strict=True
        ):
            if gradient is not None:
                total += gradient.square() / len(clean.images)
    return found


def drift(weights: Sequence[Tensor], before: Sequence[Tensor], needed: Sequence[Tensor]) -> Tensor:
    """1/2 sum_j F0_jj (w_j - w0_j)^2."""
    terms = [
        (fisher * (now - then).square()).sum()
        for now, then, fisher in zip(weights, before, needed, strict=True)
    ]
    return torch.stack(terms).sum() / 2
