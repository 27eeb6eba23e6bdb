"""Adversarial feature map pruning: convolution channels by which clean images are led astray.

Huang, Bu, "Adversarial Feature Map Pruning for Backdoor", ICLR 2024 (arXiv 2307.11565). A channel
of a backdoor is one whose change makes the net err. For every channel k of every convolution, a
batch of clean images x is moved where the map f_k changes most:

    x_0 = x + eps sign(noise),    x_k = clip(x_0 + eps sign(gradient of MSE(f_k(x_0), f_k(x)) at x_0))

and the channel is ranked by the accuracy on x_k. In each layer of C channels the floor(share C)
with the lowest accuracy are pruned: the filter, its bias, and the scale of the batch norm behind it
become 0. Then all other weights are fine-tuned.

Use it where time is no concern and the net is wide. It costs a pass forward and one back for every
channel, and the epochs of fine-tuning. It needs labelled clean images and convolutions.

A layer of fewer than 1 / share channels is left as it is, so with the published share, layers of
fewer than 64 are. Maps and layers are paired by name as they are called; published code collects
maps in that order and prunes in the order of the module's parts. Among channels of equal accuracy,
of which there are many, that with the higher cross-entropy goes first. A pruned filter stays 0
while others learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.base import CleanData, Passes
from bimask.defences.loop import Loop, cosine, logits_of, set_lr
from bimask.defences.pruning.layers import pairs, weight_of, with_convolutions
from bimask.defences.settings import Search
from bimask.defences.sgd import (
    Epochs,
    FineTuningConfig,
    descend,
    epoch_of,
    sgd,
    weights_of,
)
from bimask.defences.simple import BEGINNING, Defended, Keeper, OnOwnStep, SimpleDefence


class FmpConfig(FineTuningConfig):
    """The settings of adversarial feature map pruning; the rate follows a cosine over the epochs."""

    share: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="of a layer's channels that are pruned, rounded down; 1/64 is published, and "
            "prunes nothing in layers of fewer than 64",
        ),
        Search(1 / 64, 0.25, log=True),
    ] = 1 / 64
    eps: Annotated[
        float,
        Field(ge=0, description="of each of the two moves of a value of an image"),
        Search(1 / 255, 16 / 255, log=True),
    ] = 1 / 255
    ranking_images: int = Field(32, ge=1, description="clean images that channels are ranked by")
    last_lr: float = Field(1e-4, ge=0, description="what the rate goes to")
    epochs: Epochs = 10


class Filters(nn.Module):
    """Which channels of each layer are pruned: (C,) bool, none at first."""

    def __init__(self, net: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for number, name in enumerate(names):
            weight = weight_of(net, name)
            none = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
            self.register_buffer(str(number), none)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Layer and its pruned channels, (C,)."""
        for number, name in enumerate(self.names):
            yield name, self.get_buffer(str(number))

    @torch.no_grad()
    def cut(self, net: nn.Module, behind: Mapping[str, str]) -> None:
        """Put 0 into pruned filters, their biases, and the scales of norms `behind`, layer -> norm."""
        for name, out in self.items():
            weight_of(net, name)[out] = 0
            bias = net.get_submodule(name).bias
            if isinstance(bias, Tensor):
                bias[out] = 0
            if name in behind:
                weight_of(net, behind[name])[out] = 0


class Fmp(SimpleDefence[FmpConfig]):
    """Adversarial feature map pruning."""

    name = "fmp"
    config = FmpConfig
    needs_labels = True
    numbers = ("pruned_share",)

    def check(self, model: nn.Module, images: Tensor) -> None:
        with_convolutions(model, images, "FMP")

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: FmpConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[FmpConfig]:
        """Rank and prune, then fine-tune. A run goes on from the end of a layer, or of an epoch.

        Raises:
            ModelError: the model has no convolution with weights of its own.
        """
        net, names = with_convolutions(model, clean.images, "FMP")
        like = weights_of(net.requires_grad_(True))[0]
        behind = {layer: norm for norm, layer in pairs(net, clean.images[:1].to(like)).items()}
        filters = Filters(net, names)
        optimiser = sgd(net, config)
        assert clean.labels is not None
        rows = torch.randperm(len(clean.images), generator=generator)[: config.ranking_images]
        rows = rows.to(clean.images.device)
        images, labels = clean.images[rows].to(like.dtype), clean.labels[rows]
        signs = torch.randint(0, 2, images.shape, generator=generator).to(images) * 2 - 1
        noisy = (images + config.eps * signs).clamp(0, 1)

        def ending() -> tuple[dict[str, Tensor], dict[str, float]]:
            outs = [out for _, out in filters.items()]
            share = sum(int(out.sum()) for out in outs) / sum(len(out) for out in outs)
            return net.state_dict(), {"pruned_share": share}

        with Loop(
            self,
            model,
            config,
            {"net": net, "filters": filters, "moments": optimiser},
            ending,
            generator=generator,
            device=clean.images.device,
            keeper=keeper,
        ) as loop:
            ranked = dict(filters.items())
            for number in loop.epochs(len(names)):
                out = ranked[names[number]]
                count = int(config.share * len(out) + 1e-9)
                if count:
                    order = ranking(net, names[number], images, noisy, labels, config.eps, loop.passes)
                    out[order[:count]] = True
            filters.cut(net, behind)
            net.train()
            for epoch in loop.epochs(config.epochs):
                rate = config.last_lr + (config.lr - config.last_lr) * cosine(epoch, config.epochs)
                set_lr(optimiser, rate)
                for seen, answers in epoch_of(clean, config, generator, net):
                    loss = F.cross_entropy(logits_of(net, seen), answers)
                    descend(optimiser, loss)
                    filters.cut(net, behind)
                    loop.passes.add(forward=1, backward=1)
                    if loop.step({"cross_entropy": loss.item()}, on_step):
                        return loop.result()
            return loop.result()


def ranking(
    net: nn.Module,
    layer: str,
    images: Tensor,
    noisy: Tensor,
    labels: Tensor,
    eps: float,
    passes: Passes,
) -> Tensor:
    """A layer's channels, (C,) int64, those first by which the most images are led astray.

    Args:
        net: in eval mode.
        images: (N, C, H, W) in [0, 1].
        noisy: x_0, in [0, 1].
    """
    right, losses = [], []
    for moved in led_astray(net, layer, images, noisy, eps, passes):
        with torch.no_grad():
            logits = logits_of(net, moved)
        passes.add(forward=1, backward=0)
        right.append(int((logits.argmax(1) == labels).sum()))
        losses.append(F.cross_entropy(logits, labels).item())
    return torch.tensor(sorted(range(len(right)), key=lambda k: (right[k], -losses[k])))


def led_astray(
    net: nn.Module, layer: str, images: Tensor, noisy: Tensor, eps: float, passes: Passes
) -> Iterator[Tensor]:
    """x_k of every channel k of a layer, (N, C, H, W) in [0, 1]."""
    with torch.no_grad(), _maps(net, layer) as found:
        logits_of(net, images)
    start = noisy.detach().requires_grad_()
    with _maps(net, layer) as moved:
        logits_of(net, start)
    passes.add(forward=2, backward=0)
    for channel in range(found[0].shape[1]):
        apart = sum(
            (
                F.mse_loss(new[:, channel], old[:, channel])
                for new, old in zip(moved, found, strict=True)
            ),
            torch.zeros((), dtype=start.dtype, device=start.device),
        )
        (slope,) = torch.autograd.grad(apart, start, retain_graph=True)
        passes.add(forward=0, backward=1)
        yield (noisy + eps * slope.sign()).clamp(0, 1)


@contextmanager
def _maps(net: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """What a layer answers while the context is open, one a call, with its graph."""
    found: list[Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(
        lambda _m, _a, out: found.append(out.clone())
    )
    try:
        yield found
    finally:
        handle.remove()
