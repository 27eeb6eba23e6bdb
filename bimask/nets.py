"""Networks that classify images in [0, 1]; normalisation is part of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.errors import SettingError


class Normalised(nn.Module):
    """`net` behind a per-channel normalisation, so that every image outside is float in [0, 1].

    Args:
        net: takes (N, C, H, W) normalised images, returns (N, K) logits.
        mean, std: one value a channel, in [0, 1] units.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or any(s <= 0 for s in std):
            raise SettingError(
                f"`mean` and `std` need one value a channel and `std > 0`, got {mean} and {std}."
            )
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, K) logits."""
        logits: Tensor = self.net((images - self.mean) / self.std)
        return logits


class PreActBlock(nn.Module):
    """Two 3x3 convolutions behind BN-ReLU each (He et al. 2016, arXiv 1603.05027, figure 4e)."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


class PreActResNet18(nn.Module):
    """PreActResNet18 as the field uses it: 3x3 stem, no BN before the pooling, 20 convolutions.

    Args:
        in_channels: image channels.
        num_classes: logits.
        width: channels of the first stage, doubled by each next; 64 is the published net
            (4,800 convolution channels), 8 has 600.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, padding=1, bias=False)
        planes = width
        for stage in range(1, 5):
            out_planes = width * 2 ** (stage - 1)
            blocks = [
                PreActBlock(planes, out_planes, stride=1 if stage == 1 else 2),
                PreActBlock(out_planes, out_planes, stride=1),
            ]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            planes = out_planes
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.linear = nn.Linear(planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for stage in range(1, 5):
            out = self.get_submodule(f"layer{stage}")(out)
        logits: Tensor = self.linear(self.avgpool(out).flatten(1))
        return logits


class ConvBlock(nn.Module):
    """Conv-BN-ReLU-Conv-BN with a projected shortcut where shapes change, then ReLU."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


class SmallResNet(nn.Module):
    """A residual net sized for digits: a stem and three blocks that halve the image each.

    Args:
        in_channels: image channels.
        num_classes: logits.
        width: channels of the stem; the blocks have 2, 4 and 8 times as many, 43 x `width` in all.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, 1, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.blocks = nn.Sequential(
            ConvBlock(width, 2 * width, stride=2),
            ConvBlock(2 * width, 4 * width, stride=2),
            ConvBlock(4 * width, 8 * width, stride=2),
        )
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(self.stem(x))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


NETS: dict[str, Callable[..., nn.Module]] = {
    "preactresnet18": PreActResNet18,
    "small_resnet": SmallResNet,
}


def build_net(
    name: str,
    *,
    in_channels: int,
    num_classes: int,
    width: int,
    mean: list[float],
    std: list[float],
) -> Normalised:
    """The net `name` of `NETS`, normalised by `mean` and `std` (one value a channel).

    Raises:
        SettingError: the name is unknown, or the width is not positive.
    """
    if name not in NETS:
        raise SettingError(f"Unknown net {name!r}; known are {', '.join(sorted(NETS))}.")
    if width < 1:
        raise SettingError(f"`width >= 1` must hold, but got width={width}.")
    net = NETS[name](in_channels=in_channels, num_classes=num_classes, width=width)
    return Normalised(net, mean, std)
