"""Residual nets of our own: the field's PreActResNet18, and a smaller one for digits."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


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
