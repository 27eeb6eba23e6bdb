"""Published nets from torchvision's classes, for small images and at any width.

Two things differ from torchvision's own constructors, which `torchvision:NAME` calls as they are:

    width        channels of the first stage, with which all others scale; the default is the published
                 net. MobileNet and EfficientNet round every layer to multiples of 8, as published.
    image_size   the published nets halve an image of 224 pixels five times. Here the first halvings
                 are left out for a small image, so that the last map keeps 4 pixels a side: 5 halvings
                 from 128 pixels, 3 at 32 (as PreActResNet18 has), 2 at 16, 1 at 8.

What is left out changes strides and poolings, never the shape of a weight of VGG, MobileNet or
EfficientNet. Weights are initialised anew; nothing is downloaded. torchvision is imported where it is
used, since that takes longer than all else here.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

HALVINGS = 5  # of the published nets
SMALLEST_MAP = 4  # pixels a side after the last halving
PATCHES = 8  # a side, at least, of a vision transformer


def halvings(image_size: int) -> int:
    """How often an image of this size is halved: at least `SMALLEST_MAP` pixels a side stay."""
    return min(HALVINGS, max(0, (image_size // SMALLEST_MAP).bit_length() - 1))


def with_in_channels(net: nn.Module, in_channels: int) -> nn.Module:
    """The net, its first convolution replaced by a fresh one if it takes another number of channels."""
    name, conv = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
    if conv.in_channels != in_channels:
        kept = ("out_channels", "kernel_size", "stride", "padding", "groups")
        settings = {setting: getattr(conv, setting) for setting in kept}
        fresh = nn.Conv2d(in_channels, bias=conv.bias is not None, **settings)
        net.set_submodule(name, fresh)
    return net


def _unstride(net: nn.Module, image_size: int) -> nn.Module:
    """Leave out the first halvings: the strided convolutions get stride 1 and keep their weights."""
    strided = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    for conv in strided[: HALVINGS - halvings(image_size)]:
        conv.stride = (1, 1)
    return net


def vgg19_bn(in_channels: int, num_classes: int, width: int = 64, image_size: int = 224) -> nn.Module:
    """VGG19 with batch norm (Simonyan, Zisserman 2015, arXiv 1409.1556): 16 convolutions.

    The first poolings are left out for a small image. The classifier is one linear layer on the mean of
    the last map, as usual on CIFAR, not the published one with 120 million weights.

    Args:
        width: channels of the first stage; 64 is the published net (5,504 channels in all).
    """
    from torchvision.models.vgg import VGG, cfgs, make_layers

    plan: list[str | int] = []
    dropped = HALVINGS - halvings(image_size)
    for layer in cfgs["E"]:
        if layer == "M" and dropped:
            dropped -= 1
        else:
            plan.append(layer if isinstance(layer, str) else max(1, layer * width // 64))
    with torch.device("meta"):  # the published classifier is never allocated
        net = VGG(nn.Identity(), init_weights=False)
    net.features = make_layers(plan, batch_norm=True)
    for conv in net.features:
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    net.avgpool = nn.AdaptiveAvgPool2d(1)
    net.classifier = nn.Linear(max(1, 512 * width // 64), num_classes)
    return with_in_channels(net, in_channels)


def mobilenet_v3(
    in_channels: int, num_classes: int, width: int = 16, image_size: int = 224
) -> nn.Module:
    """MobileNetV3-Large (Howard et al. 2019, arXiv 1905.02244): 62 convolutions.

    Stride 2 becomes 1 in the stem and then in the first strided blocks for a small image. The batch
    norms have a momentum of 0.1: with the published 0.01 they lag behind a short training, and a net
    that has learned its task answers at random in eval mode.

    Args:
        width: channels of the stem; 16 is the published net (17,280 channels in all).
    """
    from torchvision.models import mobilenet_v3_large

    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.1)
    net = mobilenet_v3_large(
        weights=None, width_mult=width / 16, num_classes=num_classes, norm_layer=norm
    )
    return with_in_channels(_unstride(net, image_size), in_channels)


def efficientnet_b3(
    in_channels: int, num_classes: int, width: int = 40, image_size: int = 224
) -> nn.Module:
    """EfficientNet-B3 (Tan, Le 2019, arXiv 1905.11946): 130 convolutions.

    Stride 2 becomes 1 in the stem and then in the first strided stages for a small image.

    Args:
        width: channels of the stem; 40 is the published net (63,728 channels in all).
    """
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    # expansion, kernel, stride, channels in and out, layers of B0 (table 1); B3 is 1.2 times as wide
    # and 1.4 times as deep
    rows = [
        (1, 3, 1, 32, 16, 1),
        (6, 3, 2, 16, 24, 2),
        (6, 5, 2, 24, 40, 2),
        (6, 3, 2, 40, 80, 3),
        (6, 5, 1, 80, 112, 3),
        (6, 5, 2, 112, 192, 4),
        (6, 3, 1, 192, 320, 1),
    ]
    stages = [MBConvConfig(*row, width_mult=1.2 * width / 40, depth_mult=1.4) for row in rows]
    net = EfficientNet(stages, dropout=0.3, num_classes=num_classes)
    return with_in_channels(_unstride(net, image_size), in_channels)


def convnext_tiny(
    in_channels: int, num_classes: int, width: int = 96, image_size: int = 224
) -> nn.Module:
    """ConvNeXt-Tiny (Liu et al. 2022, arXiv 2201.03545): 22 convolutions.

    For a small image the patches of the stem shrink from 4x4 to 2x2 and 1x1, then the first
    convolutions between stages from 2x2 to 1x1: each is as large as its stride.

    Initialised for SGD from scratch: weights by their fan-in and layer scales at 1. The published
    values, 0.02 and 1e-6, are for AdamW at full width; narrow nets did not learn digits from them.

    Args:
        width: channels of the first stage; 96 is the published net (8,064 channels in all).
    """
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    layers = (3, 3, 9, 3)
    stages = [
        CNBlockConfig(width * 2**i, width * 2 ** (i + 1) if i < 3 else None, depth)
        for i, depth in enumerate(layers)
    ]
    net = ConvNeXt(stages, stochastic_depth_prob=0.1, layer_scale=1.0, num_classes=num_classes)
    dropped = HALVINGS - halvings(image_size)
    strided = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.stride > (1, 1)]
    for name, conv in strided:
        size = conv.stride[0]
        while size > 1 and dropped:
            size, dropped = size // 2, dropped - 1
        if size != conv.stride[0]:
            net.set_submodule(name, nn.Conv2d(conv.in_channels, conv.out_channels, size, size))
    with_in_channels(net, in_channels)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net


def vit_b_16(in_channels: int, num_classes: int, width: int = 768, image_size: int = 224) -> nn.Module:
    """ViT-B/16 (Dosovitskiy et al. 2021, arXiv 2010.11929): 12 blocks of 12 heads.

    Patches of 16 pixels shrink by halves until there are 8 a side: 4 at 32 pixels, 2 at 16.

    Args:
        width: length of a token, 768 as published; with fewer, as many of the 12 heads as divide it.
        image_size: height and width, the only one that the net takes.
    """
    return _vit(in_channels, num_classes, width, image_size, heads=12)


def vit_tiny(in_channels: int, num_classes: int, width: int = 192, image_size: int = 224) -> nn.Module:
    """ViT-Tiny (Touvron et al. 2021, arXiv 2012.12877): 12 blocks of 3 heads; else as `vit_b_16`."""
    return _vit(in_channels, num_classes, width, image_size, heads=3)


def _vit(in_channels: int, num_classes: int, width: int, image_size: int, *, heads: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    patch = 16
    while patch > 1 and (image_size // patch < PATCHES or image_size % patch):
        patch //= 2
    net = VisionTransformer(
        image_size=image_size,
        patch_size=patch,
        num_layers=12,
        num_heads=math.gcd(width, heads),
        hidden_dim=width,
        mlp_dim=4 * width,
        num_classes=num_classes,
    )
    return with_in_channels(net, in_channels)
