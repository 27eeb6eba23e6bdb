"""Adversarial weight masking: single weights fade that one perturbation of all images exploits.

Chai, Chen, "One-shot Neural Backdoor Erasing via Adversarial Weight Masking", NeurIPS 2022 (arXiv
2207.04497). Every weight of every convolution has a mask m in [0, 1], 1 at first. In turn, one
perturbation d for all images looks for what the net errs by, and the masks learn to be right with
and without it:

    max over ||d||_1 <= t         CE(f(clip(x + d)), what f says of x)
    min over m in [0, 1]          a CE(f(x), y) + (1 - a) CE(f(clip(x + d)), y) + g ||m||_1

d begins at 0 in every round and takes one step of SGD a batch, each followed by the projection onto
the ball (Duchi et al., ICML 2008); then the masks take five passes over the images with Adam.

Use it where one image a class is all there is, or where channels are too coarse. It costs a pass
forward and two passes more for each batch of d, and two forward and back for each step of the
masks. It needs labelled clean images and convolutions.

This is the published method. What some benchmarks call by its name masks the channels of batch
norms alone. Masks stay soft: no threshold is put on them. Images are in [0, 1] when they are
clipped there; both published programs clip images that are normalised. Batch norms keep their
statistics, so that masks learn in the net as it answers (our choice).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.loop import Loop, batches, inside, steps_an_epoch
from bimask.defences.pruning.layers import ask, weight_of, with_convolutions
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.simple import BEGINNING, Defended, Keeper, OnOwnStep, SimpleDefence


class AwmConfig(DefenceConfig):
    """The settings of adversarial weight masking."""

    mask_lr: Annotated[
        float, Field(gt=0, description="of Adam on the masks"), Search(1e-3, 1e-1, log=True)
    ] = 0.01
    rounds: Annotated[
        int, Field(ge=1, description="perturbations, each followed by its passes"), Search(5, 50)
    ] = 20
    mask_epochs: int = Field(5, ge=1, description="times that every image is seen in a round")
    batch_size: int = Field(128, ge=1, description="images a step")
    alpha: Annotated[
        float, Field(ge=0, le=1, description="a, weight of the unperturbed images"), Search(0.1, 0.99)
    ] = 0.9
    mask_weight: Annotated[
        float,
        Field(ge=0, description="g, weight of the sum of the masks"),
        Search(1e-9, 1e-5, log=True),
    ] = 1e-8
    perturbation_lr: float = Field(10.0, gt=0, description="of SGD on the perturbation")
    # published as 1000 for 3x32x32 images, which says nothing to images of another size
    perturbation: Annotated[
        float,
        Field(
            ge=0,
            description="largest mean absolute perturbation of a value of an image: t of 1000 for the "
            "3,072 values of a CIFAR-10 image; 100 of them for one image a class",
        ),
        Search(0.03, 0.5),
    ] = 1000 / 3072
    shift: int = Field(0, ge=0, description="pixels that images are shifted by at most, anew each step")
    flip: bool = Field(False, description="whether half of the images are flipped, anew each step")

    def steps(self, images: int) -> int:
        """Batches that the masks learn on."""
        return self.rounds * self.mask_epochs * steps_an_epoch(images, self.batch_size)


class WeightMasks(nn.Module):
    """A mask of its weight's shape for each of these layers, 1 at first."""

    def __init__(self, net: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.values = nn.ParameterList([torch.ones_like(weight_of(net, name)) for name in names])

    def masked(self, net: nn.Module) -> dict[str, Tensor]:
        """The weights of the layers times their masks."""
        return {
            f"{name}.weight": weight_of(net, name) * mask
            for name, mask in zip(self.names, self.values, strict=True)
        }


class Awm(SimpleDefence[AwmConfig]):
    """Adversarial weight masking, of every weight of a convolution."""

    name = "awm"
    config = AwmConfig
    needs_labels = True
    numbers = ("pruned_share",)

    def check(self, model: nn.Module, images: Tensor) -> None:
        with_convolutions(model, images, "AWM")

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: AwmConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[AwmConfig]:
        """Learn masks, and fold them. Rounds are what a run goes on from.

        Raises:
            ModelError: the model has no convolution with weights of its own.
        """
        net, names = with_convolutions(model, clean.images, "AWM")
        net.requires_grad_(False)
        masks = WeightMasks(net, names)
        optimiser = torch.optim.Adam(masks.parameters(), config.mask_lr)
        largest = config.perturbation * clean.images[0].numel()

        def ending() -> tuple[dict[str, Tensor], dict[str, float]]:
            out = sum(int((mask == 0).sum()) for mask in masks.values)
            return masks.masked(net), {"pruned_share": out / sum(m.numel() for m in masks.values)}

        def seen() -> Any:
            return batches(
                clean,
                config.batch_size,
                generator,
                shift=config.shift,
                flip=config.flip,
                dtype=masks.values[0].dtype,
            )

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
            for _ in loop.epochs(config.rounds):
                tensors = {key: value.detach() for key, value in masks.masked(net).items()}
                moved = torch.zeros_like(clean.images[:1], dtype=masks.values[0].dtype)
                for images, _ in seen():
                    moved = worse(net, tensors, images, moved, config.perturbation_lr, largest)
                    loop.passes.add(forward=2, backward=1)
                for _ in range(config.mask_epochs):
                    for images, labels in seen():
                        terms = loss_terms(net, masks, images, labels, moved, config)
                        optimiser.zero_grad()
                        (terms["natural"] + terms["perturbed"] + terms["masks"]).backward()
                        optimiser.step()
                        with torch.no_grad():
                            for mask in masks.values:
                                mask.clamp_(0, 1)
                        loop.passes.add(forward=2, backward=2)
                        if loop.step({key: term.item() for key, term in terms.items()}, on_step):
                            return loop.result()
            return loop.result()


def worse(
    net: nn.Module,
    tensors: Mapping[str, Tensor],
    images: Tensor,
    moved: Tensor,
    lr: float,
    largest: float,
) -> Tensor:
    """The perturbation (1, C, H, W) after a step up the cross-entropy to what the net says of the
    images."""
    with torch.no_grad():
        said = ask(net, tensors, images).argmax(1)
    moved = moved.detach().requires_grad_()
    loss = F.cross_entropy(ask(net, tensors, inside(images + moved)), said)
    (slope,) = torch.autograd.grad(loss, moved)
    return onto_l1(moved.detach() + lr * slope, largest)


def onto_l1(values: Tensor, largest: float) -> Tensor:
    """The nearest point of the L1 ball of this radius (Duchi et al., ICML 2008, figure 1)."""
    sizes = values.abs().flatten()
    if sizes.sum() <= largest:
        return values
    ordered = sizes.sort(descending=True).values
    excess = (ordered.cumsum(0) - largest) / torch.arange(1, len(ordered) + 1).to(ordered)
    by = excess[int((ordered >= excess).nonzero().max())]
    return values.sign() * (values.abs() - by).clamp_min(0)


def loss_terms(
    net: nn.Module,
    masks: WeightMasks,
    images: Tensor,
    labels: Tensor,
    moved: Tensor,
    config: AwmConfig,
) -> dict[str, Tensor]:
    """The loss of the masks, by terms."""
    tensors = masks.masked(net)
    natural = F.cross_entropy(ask(net, tensors, images), labels)
    perturbed = F.cross_entropy(ask(net, tensors, inside(images + moved)), labels)
    size = sum((mask.abs().sum() for mask in masks.values), torch.zeros_like(natural))
    return {
        "natural": config.alpha * natural,
        "perturbed": (1 - config.alpha) * perturbed,
        "masks": config.mask_weight * size,
    }
