"""Neural mask fine-tuning: bounded masks on the scales of batch norms learn on mixed clean images.

Karim, Al Arafat, Khalid, Guo, Rahnavard, "Augmented Neural Fine-Tuning for Efficient Backdoor
Purification", ECCV 2024 (arXiv 2407.10052). Only a mask m on the scales of the batch norms learns,
on images mixed in pairs (mixup, l drawn from Beta(a, a)):

    x = l x_i + (1 - l) x_j
    min over m   l CE(f(x), y_i) + (1 - l) CE(f(x), y_j) + (w / N_c) sum |1 - m|

with N_c clean images a class. After every step the masks of layer l = 1, 2, ... are put back between
mu exp(-beta l) and 1: those of early layers, which clean images need most, stay closest to 1.

Use it where there are few clean images, one a class at the least. It costs one pass forward and one
back in each iteration. It needs labelled clean images and batch norms with a scale.

Layers are counted in the order in which they are called, not in that of the module's parts. Masks
are folded into the scales, so that the model keeps its architecture; the running statistics, which
go on to learn, are those of the mixed images.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.loop import Loop, cosine, iterations, set_lr
from bimask.defences.pruning.layers import BatchNorm, NormMasks, ask, with_norms
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.simple import BEGINNING, Defended, Keeper, OnOwnStep, SimpleDefence


class NftConfig(DefenceConfig):
    """The settings of neural mask fine-tuning; the rate follows a cosine over the iterations."""

    mask_lr: Annotated[
        float,
        Field(gt=0, description="of SGD on the masks, in the first iteration"),
        Search(0.005, 0.5, log=True),
    ] = 0.05
    last_mask_lr: float = Field(0.02, ge=0, description="what the rate goes to")
    momentum: float = Field(0.95, ge=0, lt=1, description="of SGD on the masks")
    iterations: Annotated[
        int, Field(ge=1, description="batches that the masks learn on"), Search(50, 1000, log=True)
    ] = 1000
    batch_size: int = Field(128, ge=2, description="images an iteration; batch norms need two")
    mixup: float = Field(
        1.0, gt=0, description="a of the Beta(a, a) that shares of a pair are drawn of"
    )
    mask_weight: Annotated[
        float,
        Field(ge=0, description="w, the weight of the masks' distance from 1, with one image a class"),
        Search(1e-4, 1e-2, log=True),
    ] = 1e-3
    floor: Annotated[
        float, Field(ge=0, le=1, description="mu, of the lowest mask of a layer"), Search(0.0, 1.0)
    ] = 0.8
    decay: Annotated[
        float,
        Field(ge=0, description="beta, by which the lowest mask falls from layer to layer"),
        Search(0.1, 1.0),
    ] = 0.5
    shift: int = Field(0, ge=0, description="pixels that images are shifted by at most, anew each step")
    flip: bool = Field(False, description="whether half of the images are flipped, anew each step")

    def steps(self, images: int) -> int:
        """The iterations."""
        return self.iterations


class Nft(SimpleDefence[NftConfig]):
    """Neural mask fine-tuning."""

    name = "nft"
    config = NftConfig
    needs_labels = True

    def check(self, model: nn.Module, images: Tensor) -> None:
        with_norms(model, images, "NFT")

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: NftConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[NftConfig]:
        """Learn masks, and fold them. Epochs are what a run goes on from.

        Raises:
            ModelError: the model has no batch norm with a scale.
        """
        net, names = with_norms(model, clean.images, "NFT")
        net.train().requires_grad_(False)
        masks = NormMasks(net, names)
        lows = lowest(len(names), config.floor, config.decay)
        assert clean.labels is not None
        weight = config.mask_weight * len(clean.labels.unique()) / len(clean.labels)
        optimiser = torch.optim.SGD(masks.parameters(), config.mask_lr, momentum=config.momentum)

        def ending() -> tuple[dict[str, Tensor], dict[str, float]]:
            statistics = {
                f"{name}.{key}": value
                for name, module in net.named_modules()
                if isinstance(module, BatchNorm)
                for key, value in module.named_buffers(recurse=False)
            }
            return statistics | masks.scaled(net), {}

        with Loop(
            self,
            model,
            config,
            {"net": net, "masks": masks, "moments": optimiser},
            ending,
            generator=generator,
            device=clean.images.device,
            keeper=keeper,
        ) as loop:
            for number, images, labels in iterations(
                loop,
                config.iterations,
                clean,
                config.batch_size,
                generator,
                shift=config.shift,
                flip=config.flip,
                dtype=masks.values[0].dtype,
            ):
                first, last = config.mask_lr, config.last_mask_lr
                set_lr(optimiser, last + (first - last) * cosine(number, config.iterations))
                share = float(torch.distributions.Beta(config.mixup, config.mixup).sample())
                pairs = torch.randperm(len(images), generator=generator).to(images.device)
                terms = loss_terms(net, masks, images, labels, pairs, share, weight)
                optimiser.zero_grad()
                (terms["cross_entropy"] + terms["masks"]).backward()
                optimiser.step()
                masks.clamp_(lows)
                loop.passes.add(forward=1, backward=1)
                if loop.step({key: term.item() for key, term in terms.items()}, on_step):
                    break
            return loop.result()


def lowest(layers: int, floor: float, decay: float) -> list[float]:
    """The lowest mask of each layer, l = 1, 2, ...: floor exp(-decay l)."""
    return [floor * math.exp(-decay * layer) for layer in range(1, layers + 1)]


def loss_terms(
    net: nn.Module,
    masks: NormMasks,
    images: Tensor,
    labels: Tensor,
    pairs: Tensor,
    share: float,
    weight: float,
) -> dict[str, Tensor]:
    """The loss of the masks, by terms.

    Args:
        pairs: (B,), of every image the one that it is mixed with.
        share: l, of the image itself.
        weight: of the sum of |1 - m|.
    """
    logits = ask(net, masks.scaled(net), share * images + (1 - share) * images[pairs])
    mixed = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(
        logits, labels[pairs]
    )
    apart = sum(((1 - mask).abs().sum() for mask in masks.values), torch.zeros_like(mixed))
    return {"cross_entropy": mixed, "masks": weight * apart}
