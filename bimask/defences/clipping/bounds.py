"""A net whose activations have bounds that can be learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bimask.defences.clipping.activations import (
    Granularity,
    Place,
    innermost_first,
    metered,
    places_in,
)
from bimask.errors import ModelError
from bimask.masking.copies import copied
from bimask.masking.inserted import ActivationBound, put_around


@dataclass(frozen=True)
class Bounded:
    """A net with bounds that can be learned.

    Attributes:
        net: a copy, frozen.
        places: in the order of `start`, `scale`, `shift`.
        scale, shift: a bound is shift + scale * number, >= 0.
        start: the number that it begins at.
    """

    net: nn.Module
    places: list[Place]
    around: list[ActivationBound]
    start: list[Tensor]
    scale: list[Tensor]
    shift: list[Tensor]

    def bounds(self, numbers: nn.ParameterList) -> list[Tensor]:
        return [
            # at 0 a clamp of newer torch has no gradient, and a bound there would never move again
            torch.where(bound >= 0, bound, 0.0)
            for bound in (
                shift + scale * number
                for number, scale, shift in zip(numbers, self.scale, self.shift, strict=True)
            )
        ]

    def set(self, bounds: list[Tensor]) -> None:
        for around, bound in zip(self.around, bounds, strict=True):
            around.bound = bound


class Learned(nn.Module):
    """What changes from step to step."""

    best_size: Tensor
    schedule: Tensor

    def __init__(self, bounded: Bounded, schedule: Tensor) -> None:
        super().__init__()
        self.numbers = nn.ParameterList([nn.Parameter(value.clone()) for value in bounded.start])
        for index, bound in enumerate(bounded.bounds(self.numbers)):
            self.register_buffer(f"best_{index}", bound.detach().clone())
        self.register_buffer("best_size", torch.tensor(torch.inf, dtype=torch.float64))
        self.register_buffer("schedule", schedule)

    @property
    def best(self) -> list[Tensor]:
        return [self.get_buffer(f"best_{index}") for index in range(len(self.numbers))]

    def keep(self, bounds: list[Tensor], size: float) -> None:
        self.best_size.fill_(size)
        for own, bound in zip(self.best, bounds, strict=True):
            own.copy_(bound.detach())


def places_of(net: nn.Module, images: Tensor, which: str) -> list[Place]:
    found = places_in(net, images)
    if not found:
        raise ModelError(
            "UNIT cuts off what activation functions such as ReLU answer, and this model calls none "
            "that it can reach; take another defence, such as `ims`."
        )
    return found if which == "all" else found[len(found) // 2 :]


def bounded_net(
    net: nn.Module,
    images: Tensor,
    *,
    deviations: float,
    granularity: Granularity,
    scaled: bool,
    which: str,
) -> Bounded:
    """The net with bounds where they begin, by what it shows on these images."""
    places = places_of(net, images[:1], which)
    measured = dict(metered(net, places, images, granularity))
    own = copied(net)
    around, start, scale, shift = {}, [], [], []
    for place in innermost_first(places):
        outer = ActivationBound(own.get_submodule(place.module), torch.empty(0))
        put_around(own, place.module, outer)
        around[place] = outer
    for place in places:
        mean, std = (value.to(images) for value in measured[place].statistics())
        if scaled:
            start.append(torch.full_like(mean, deviations))
            scale.append(std)
            shift.append(mean)
        else:
            start.append(mean + deviations * std)
            scale.append(torch.ones_like(mean))
            shift.append(torch.zeros_like(mean))
    return Bounded(own, places, [around[place] for place in places], start, scale, shift)


def size_of(numbers: nn.ParameterList, bounds: list[Tensor], scaled: bool) -> Tensor:
    """The sum over layers of the mean bound, or of the mean number of deviations."""
    sized = list(numbers) if scaled else bounds
    return torch.stack([value.mean() for value in sized]).sum()


def hold_above_zero(bounded: Bounded, numbers: nn.ParameterList) -> None:
    """Numbers whose bound is below 0 become those whose bound is 0, so that gradients reach them."""
    for number, scale, shift in zip(numbers, bounded.scale, bounded.shift, strict=True):
        least = torch.where(scale > 0, -shift / scale, torch.zeros_like(shift))
        number.copy_(number.maximum(least))


@torch.no_grad()
def clipped_share(bounded: Bounded, images: Tensor) -> float:
    """The share of activations of these images that are cut off, in the mean over places."""
    shares: list[float] = []

    def watch(around: ActivationBound) -> Any:
        return lambda _module, _args, out: shares.append((out > around.bound).float().mean().item())

    handles = [around.block.register_forward_hook(watch(around)) for around in bounded.around]
    bounded.net(images)
    for handle in handles:
        handle.remove()
    return sum(shares) / len(shares)
