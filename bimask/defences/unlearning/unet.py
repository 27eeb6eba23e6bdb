"""A small U-Net that makes changed images of images, for inverting triggers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ImageChanger(nn.Module):
    """Images with a change that a U-Net makes up, of two levels below the first: small enough for
    images of 8x8 pixels and for few of them. It has no norms, which few images would teach badly.

    Args:
        channels: of an image.
        width: channels of the first level; they double with each.
        bound: largest mean square of an image's change, of pixels in [0, 1]; a larger change is scaled
            back to it.
        generator: CPU; the first weights are drawn from it.
    """

    def __init__(self, channels: int, width: int, bound: float, generator: torch.Generator) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # layers draw weights, which are not kept
            self.down = nn.ModuleList(
                [_block(channels, width), _block(width, 2 * width), _block(2 * width, 4 * width)]
            )
            self.up = nn.ModuleList([_block(6 * width, 2 * width), _block(3 * width, width)])
            self.last = nn.Conv2d(width, channels, 1)
        self.bound = bound
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1], of images in that range."""
        levels = []
        values = images
        for depth, block in enumerate(self.down):
            values = block(values if depth == 0 else F.max_pool2d(values, 2, ceil_mode=True))
            levels.append(values)
        for block, beside in zip(self.up, levels[-2::-1], strict=True):
            larger = F.interpolate(values, size=beside.shape[-2:])
            values = block(torch.cat([larger, beside], 1))
        change: Tensor = self.last(values)
        size = change.square().flatten(1).mean(1).clamp_min(1e-12)
        change = change * (self.bound / size).sqrt().clamp_max(1).view(-1, 1, 1, 1)
        return (images + change).clamp(0, 1)


def _block(channels: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
    )
