"""Plain nets as strangers write them: a class, its layers, a forward; images in [0, 1] go in.

They are not this project's nets on purpose. Normalisation is by constants inside `forward`, maps are
flattened by `.view`, and what comes out need not be logits: see `Habit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.tokens import Mixer, ViT
from bimask.nets.residual import PreActResNet18


class LeNet(nn.Module):
    """LeCun's net with rectifiers, pooled by maxima or by means."""

    def __init__(self, channels: int, side: int, classes: int, *, pool: str = "max") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2)
        self.flat = 16 * ((side // 2 - 4) // 2) ** 2
        self.fc1 = nn.Linear(self.flat, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, self.flat)
        x = F.relu(self.fc1(x))
        return self.fc3(F.relu(self.fc2(x)))


class TwoConv(nn.Module):
    """Two convolutions and two linear layers, as in PyTorch's own MNIST example."""

    def __init__(
        self,
        channels: int,
        side: int,
        classes: int,
        *,
        norm: bool = False,
        width: int = 16,
        dropout: float = 0,
        mean: float = 0.1307,
        std: float = 0.3081,
    ) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.bn2 = nn.BatchNorm2d(2 * width) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.fc1 = nn.Linear(2 * width * (side // 4) ** 2, 64)
        self.fc2 = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = x.view(x.size(0), -1)
        x = F.relu(self.fc1(self.drop(x)))
        return self.fc2(self.drop(x))


class AllConv(nn.Module):
    """Convolutions with strides in place of pooling, then a mean over the map and one Linear."""

    def __init__(
        self, channels: int, side: int, classes: int, *, width: int = 16, norm: bool = True
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = channels
        for factor, stride in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1)):
            layers.append(nn.Conv2d(before, factor * width, 3, stride, 1, bias=not norm))
            if norm:
                layers.append(nn.BatchNorm2d(factor * width))
            layers.append(nn.LeakyReLU(0.1))
            before = factor * width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x * 2 - 1).mean((2, 3)))


class GroupNormNet(nn.Module):
    """Convolutions with group norms, pooled by maxima."""

    def __init__(
        self, channels: int, side: int, classes: int, *, width: int = 16, groups: int = 4
    ) -> None:
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(groups, b) for b in widths[1:])
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.5) / 0.25
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(F.silu(norm(conv(x))), 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class NormFree(nn.Module):
    """A residual net without any normalisation: every branch starts at zero times its output."""

    def __init__(
        self, channels: int, side: int, classes: int, *, width: int = 16, blocks: int = 2
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.first = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.gain = nn.Parameter(torch.zeros(blocks))
        self.fc = nn.Linear(16 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        for position, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            x = F.relu(x + self.gain[position] * second(F.relu(first(x))))
        x = F.adaptive_avg_pool2d(x, 4)
        return self.fc(x.reshape(x.size(0), -1))


class PreActivation(nn.Module):
    """A block of a WideResNet: norm, rectifier and convolution, twice."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        same = before == after and stride == 1
        self.shortcut = None if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        beside = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return beside + self.conv2(F.relu(self.bn2(out)))


class WideResNet(nn.Module):
    """A WideResNet of factor 1 (Zagoruyko and Komodakis 2016); two blocks a stage make depth 16."""

    def __init__(
        self, channels: int, side: int, classes: int, *, width: int = 16, blocks: int = 2
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.stages, before = nn.ModuleList(), width
        for stage in range(3):
            after, strides = width * 2**stage, [2 if stage else 1] + [1] * (blocks - 1)
            befores = [before] + [after] * (blocks - 1)
            pairs = zip(befores, strides, strict=True)
            self.stages.append(nn.Sequential(*(PreActivation(b, after, s) for b, s in pairs)))
            before = after
        self.bn = nn.BatchNorm2d(before)
        self.fc = nn.Linear(before, classes)

    def everything(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps after every stage, then the logits."""
        x, maps = self.conv1((x - 0.47) / 0.25), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        x = F.relu(self.bn(x))
        x = F.avg_pool2d(x, x.size(-1))
        return (*maps, self.fc(x.view(-1, self.fc.in_features)))

    def forward(self, x: Tensor) -> Tensor:
        return self.everything(x)[-1]


class MobileNet(nn.Module):
    """A small MobileNet (Howard et al. 2017): depthwise and pointwise convolutions by turns."""

    def __init__(self, channels: int, side: int, classes: int, *, width: int = 16) -> None:
        super().__init__()

        def norm(size: int) -> list[nn.Module]:
            return [nn.BatchNorm2d(size), nn.ReLU6()]

        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), *norm(width)]
        before = width
        for factor, stride in ((2, 2), (2, 1), (4, 2), (4, 1)):
            after = factor * width
            layers.append(nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False))
            layers += [*norm(before), nn.Conv2d(before, after, 1, bias=False), *norm(after)]
            before = after
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(self.dropout(x.flatten(1)))


class MLP(nn.Module):
    """Linear layers alone."""

    def __init__(
        self, channels: int, side: int, classes: int, *, width: int = 128, dropout: float = 0
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(channels * side * side, width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.reshape(len(x), -1))


class PreAct(PreActResNet18):
    """The field's own net, as papers on backdoors train it on CIFAR-10; normalised inside."""

    def __init__(self, channels: int, side: int, classes: int, *, width: int = 16) -> None:
        super().__init__(channels, classes, width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.47) / 0.25)


class Habit(nn.Module):
    """A net whose answers are something else than logits: "softmax", "log_softmax" or "tuple".

    A tuple is the maps of a `WideResNet` and, at last, its logits.
    """

    def __init__(self, net: nn.Module, habit: str) -> None:
        super().__init__()
        if habit == "tuple" and not isinstance(net, WideResNet):
            raise ValueError(f"Only a WideResNet answers with a tuple, not a {type(net).__name__}.")
        self.net, self.habit = net, habit

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        if isinstance(self.net, WideResNet) and self.habit == "tuple":
            return self.net.everything(x)
        logits: Tensor = self.net(x)
        return logits.softmax(1) if self.habit == "softmax" else logits.log_softmax(1)


def plain_layout(images: Tensor) -> Tensor:
    """The same with torch's usual strides, as `.view` in a net wants them, also of one channel."""
    return images.flatten(1).clone(memory_format=torch.contiguous_format).view(images.shape)


class Answering(nn.Module):
    """Any stranger as `bimask.metrics` wants a model: images of any strides in, one tensor out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor | tuple[Tensor, ...] = self.net(plain_layout(x))
        return out[-1] if isinstance(out, tuple) else out


NETS: dict[str, Callable[..., nn.Module]] = {
    "all_conv": AllConv,
    "group_norm": GroupNormNet,
    "lenet": LeNet,
    "mixer": Mixer,
    "mlp": MLP,
    "mobilenet": MobileNet,
    "norm_free": NormFree,
    "preact": PreAct,
    "two_conv": TwoConv,
    "vit": ViT,
    "wide_resnet": WideResNet,
}


def build(
    kind: str, settings: Mapping[str, Any], *, channels: int, side: int, classes: int
) -> nn.Module:
    """The bare net `kind` of `NETS`, which answers with logits."""
    return NETS[kind](channels, side, classes, **settings)
