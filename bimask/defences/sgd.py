"""What defences that train share, written once: settings of SGD, and steps along a loss.

The types are for configurations that have the fields in an order of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from bimask.defences.base import CleanData
from bimask.defences.loop import batches, steps_an_epoch
from bimask.defences.settings import DefenceConfig, Search

LearningRate = Annotated[
    float, Field(gt=0, description="of SGD, in the first epoch"), Search(1e-4, 1e-1, log=True)
]
Epochs = Annotated[
    int, Field(ge=1, description="times that every image is seen"), Search(5, 200, log=True)
]
BatchSize = Annotated[int, Field(ge=2, description="images a step; batch norms need two")]
Momentum = Annotated[float, Field(ge=0, lt=1, description="of SGD")]
WeightDecay = Annotated[float, Field(ge=0, description="of SGD")]
Shift = Annotated[
    int, Field(ge=0, description="pixels that images are shifted by at most, anew each step")
]
Flip = Annotated[bool, Field(description="whether half of the images are flipped, anew each step")]


class FineTuningConfig(DefenceConfig):
    """SGD over all images for some epochs; the learning rate follows a cosine to 0 over them."""

    lr: LearningRate = 0.01
    epochs: Epochs = 100
    batch_size: BatchSize = 256
    momentum: Momentum = 0.9
    weight_decay: WeightDecay = 5e-4
    shift: Shift = 0
    flip: Flip = False

    def steps(self, images: int) -> int:
        """Batches over all epochs."""
        return self.epochs * steps_an_epoch(images, self.batch_size)


def weights_of(net: nn.Module) -> list[nn.Parameter]:
    """All that can be learned of a net."""
    return [weight for weight in net.parameters() if weight.is_floating_point()]


def sgd(net: nn.Module, config: FineTuningConfig) -> torch.optim.SGD:
    """The optimiser of all weights of a net."""
    return torch.optim.SGD(
        weights_of(net), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )


def epoch_of(
    clean: CleanData, config: FineTuningConfig, generator: torch.Generator, net: nn.Module
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch, as the net's weights take them: see `batches`."""
    return batches(
        clean,
        config.batch_size,
        generator,
        shift=config.shift,
        flip=config.flip,
        dtype=weights_of(net)[0].dtype,
    )


def descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of an optimiser along the gradient of a loss."""
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
