"""What the members' perturbations were, and where those of the next round start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.member import Member
from bimask.devices import upload


class Start(NamedTuple):
    """Where the perturbations of a round start.

    Attributes:
        delta: (M, N, C, H, W); None where all start at 0.
        shared: (M, N, 1, 1, 1) booleans, the images with one perturbation in common; None where no
            member has any.
        leaders: of each member the position of an image that shares, or None.
    """

    delta: Tensor | None
    shared: Tensor | None
    leaders: list[int | None]


class Perturbations:
    """Every member's perturbations from one round to the next: one of each image, one universal.

    Args:
        configs: one a member.
        images: (n, C, H, W), those of all members.
    """

    def __init__(self, configs: Sequence[PurifyConfig], images: Tensor) -> None:
        self.own = self.universal = None
        if any(config.warm_start for config in configs):
            self.own = images.new_zeros(len(configs), *images.shape)
            self.universal = images.new_zeros(len(configs), *images.shape[1:])

    def start(self, group: list[Member], batches: list[Tensor] | None, x: Tensor) -> Start:
        """Drawn anew: the images that share, and those whose perturbation goes on; the others' is 0.

        Args:
            group: M members.
            batches: which images each looks at, (N,); None means all.
            x: these images, (M, N, C, H, W).
        """
        n = x.shape[1]
        delta = None if self.own is None else torch.zeros_like(x)
        shared = torch.zeros(len(group), n, 1, 1, 1, dtype=torch.bool)
        leaders: list[int | None] = [None] * len(group)
        for row, member in enumerate(group):
            warm, generator = member.config.warm_start, member.generator
            if warm and delta is not None and self.own is not None:
                goes_on = torch.rand(n, 1, 1, 1, generator=generator) < warm
                delta[row] = self.own[member.row, _where(batches, row)] * upload(goes_on, x)
            if count := round(member.config.universal * n):
                chosen = torch.randperm(n, generator=generator)[:count]
                shared[row, chosen], leaders[row] = True, int(chosen[0])
                if warm and delta is not None and self.universal is not None:
                    goes_on = torch.rand((), generator=generator) < warm
                    common = self.universal[member.row] * upload(goes_on, x)
                    delta[row] = torch.where(upload(shared[row], x), common, delta[row])
        none = all(leader is None for leader in leaders)
        return Start(delta, None if none else upload(shared, x), leaders)

    def keep(
        self, group: list[Member], batches: list[Tensor] | None, start: Start, delta: Tensor
    ) -> None:
        """Remember where a round ended; an image that shared keeps the perturbation it had alone.

        Args:
            delta: (M, N, C, H, W), of the same group and batches as `start`.
        """
        if self.own is None or self.universal is None:
            return
        for row, member in enumerate(group):
            ended, where = delta[row], (member.row, _where(batches, row))
            if (leader := start.leaders[row]) is not None and start.shared is not None:
                self.universal[member.row] = ended[leader]
                ended = torch.where(start.shared[row], self.own[where], ended)
            self.own[where] = ended


def of_images(
    values: list[tuple[float, float]], shared: Tensor | None, like: Tensor
) -> list[float] | Tensor:
    """What each member's images go by: its first number, its second where they share a perturbation.

    Args:
        values: (own, common), M of them.
        shared: (M, N, 1, 1, 1) booleans; None where no image shares.
    """
    own = [first for first, _ in values]
    if shared is None:
        return own
    columns = upload(torch.tensor(values, dtype=like.dtype), like).T.view(2, -1, 1, 1, 1, 1)
    return torch.where(shared, columns[1], columns[0])


def _where(batches: list[Tensor] | None, row: int) -> Tensor | slice:
    return slice(None) if batches is None else batches[row]
