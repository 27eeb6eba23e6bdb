"""Pictures in, classes and probabilities out, or one sentence on what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bimask.data.sent import MOST_IMAGES as MOST_IMAGES
from bimask.data.sent import read_sent
from bimask.nets.answers import logits_of


class Classifier:
    """A model that is asked from outside.

    An image is a PNG or an array of the model's own size, as `bimask.data.sent.read_sent` takes it.

    Args:
        model: (N, C, H, W) float in [0, 1] -> (N, K) logits; it is put into eval mode.
        classes: K names.
        shape: (C, H, W) of an image.
    """

    def __init__(self, model: nn.Module, classes: Sequence[str], shape: tuple[int, int, int]) -> None:
        self.model = model.eval()
        self.classes = tuple(classes)
        self.shape = shape

    def __call__(self, images: Any) -> list[dict[str, Any]]:
        """`class`, a name, and `probabilities`, class name -> [0, 1], of every image.

        Raises:
            DataError: an image is none, or of another shape, type or range.
        """
        probabilities = logits_of(self.model, torch.stack(read_sent(images, self.shape))).softmax(1)
        return [
            {
                "class": self.classes[int(row.argmax())],
                "probabilities": dict(zip(self.classes, row.tolist(), strict=True)),
            }
            for row in probabilities
        ]
