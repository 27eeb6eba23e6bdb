"""Networks that classify images in [0, 1]; normalisation is part of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bimask.data.pictures import Size
from bimask.errors import SettingError
from bimask.nets.named import (
    call_with,
    checked,
    code_of_files,
    factory_of,
    is_own,
    may_run,
    require_known,
    require_trusted,
    source_of,
)
from bimask.nets.published import (
    convnext_tiny,
    efficientnet_b3,
    mobilenet_v3,
    vgg19_bn,
    vit_b_16,
    vit_tiny,
)
from bimask.nets.residual import PreActResNet18, SmallResNet

NETS: dict[str, Callable[..., nn.Module]] = {
    "convnext_tiny": convnext_tiny,
    "efficientnet_b3": efficientnet_b3,
    "mobilenet_v3_large": mobilenet_v3,
    "preactresnet18": PreActResNet18,
    "small_resnet": SmallResNet,
    "vgg19_bn": vgg19_bn,
    "vit_b_16": vit_b_16,
    "vit_tiny": vit_tiny,
}


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


def check_net(name: str) -> None:
    """Refuse a name that no net can have; nothing is imported and nothing run.

    Raises:
        SettingError: not in `NETS`, not `torchvision:NAME`, `timm:NAME`, `package.module:factory` or
            `path/to/file.py:factory`, or a file that is not there.
    """
    if name not in NETS:
        require_known(name, NETS)


def build_net(
    name: str,
    *,
    in_channels: int,
    num_classes: int,
    width: int | None = None,
    image_size: Size | None = None,
    mean: list[float],
    std: list[float],
) -> Normalised:
    """The net `name`, normalised by `mean` and `std` (one value a channel).

    Args:
        name: of `NETS`, or one of the forms in `bimask.nets.named`, whose code is imported and run.
        width: channels of the first stage; None is the net as published. Only `NETS` have one, and
            factories that take a `width`.
        image_size: of the images, (height, width) or the side of a square; None is the published
            size. Nets that do not depend on it take any. `NETS` are made for the shorter side.

    Raises:
        SettingError: the name is unknown, the width is not positive or not taken, or an own factory is
            missing, fails, or gives something else than a net for these images and classes.
    """
    check_net(name)
    if width is not None and width < 1:
        raise SettingError(f"`width >= 1` must hold, but got width={width}.")
    offered: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels}
    if image_size is not None:
        offered["image_size"] = image_size
    if name in NETS and isinstance(image_size, tuple):
        if name.startswith("vit_"):
            raise SettingError(
                f"The net {name} takes square images alone, got {image_size[0]}x{image_size[1]}; give "
                "an image size."
            )
        offered["image_size"] = min(image_size)
    if width is not None:
        offered["width"] = width
    if name in NETS:
        net = call_with(name, NETS[name], offered)
    else:
        made = call_with(name, factory_of(name), offered)
        net = checked(name, made, in_channels, num_classes, image_size)
    return Normalised(net, mean, std)


__all__ = [
    "NETS",
    "Normalised",
    "PreActResNet18",
    "SmallResNet",
    "build_net",
    "check_net",
    "code_of_files",
    "is_own",
    "may_run",
    "require_trusted",
    "source_of",
]
