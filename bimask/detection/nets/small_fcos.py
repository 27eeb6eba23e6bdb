"""A detector small enough to be trained on two cores in minutes, of torchvision's own parts."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead

from bimask.errors import SettingError

STRIDES = (2, 2, 2, 1, 1)
STRIDE = 8  # pixels a location
GROUPS = 32  # of the head's group norms


class Backbone(nn.Sequential):
    """Five 3x3 convolutions to an eighth of the size, each before a batch norm and a ReLU.

    Attributes:
        out_channels: what torchvision's detectors ask of a backbone.
    """

    def __init__(self, width: int) -> None:
        channels = (3, width // 2, width, width, width, width)
        super().__init__(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                )
                for (before, after), stride in zip(pairwise(channels), STRIDES, strict=True)
            )
        )
        self.out_channels = width


def small_fcos(num_classes: int, width: int = 64, image_size: int = 96) -> FCOS:
    """FCOS (Tian et al. 2019, arXiv 1904.01355) with one level of locations, one each 8 pixels.

    Args:
        num_classes: without a background, of which FCOS has none.
        width: channels of the features and the head, a multiple of 32.
        image_size: both sides of an image are brought to this many pixels or less.

    Raises:
        SettingError: a width that the head's norms do not divide.
    """
    if width < GROUPS or width % GROUPS:
        raise SettingError(
            f"`width` of small_fcos must be a positive multiple of {GROUPS}, got width={width}."
        )
    return FCOS(
        Backbone(width),
        num_classes,
        min_size=image_size,
        max_size=image_size,
        anchor_generator=AnchorGenerator(sizes=((STRIDE,),), aspect_ratios=((1.0,),)),
        head=FCOSHead(width, num_anchors=1, num_classes=num_classes, num_convs=1),
    )
