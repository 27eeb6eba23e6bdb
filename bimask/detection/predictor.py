"""Pictures in, boxes, class names and scores out, or one sentence on what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bimask.data.sent import read_sent
from bimask.detection.nets.detector import Detector
from bimask.errors import DataError, ModelError


class DetectionPredictor:
    """A detector that is asked from outside.

    An image is a PNG or an array of the largest size or less, as `bimask.data.sent.read_sent` takes it.

    Args:
        model: as `bimask.detection.nets.detector.Detector`; it is put into eval mode.
        classes: K names.
        side: pixels that an image may be high and wide.

    Attributes:
        shape: (C, H, W) of the largest image.
    """

    def __init__(self, model: Detector, classes: Sequence[str], side: int) -> None:
        self.model = model.eval()
        self.classes = tuple(classes)
        self.shape = (3, side, side)

    @torch.no_grad()
    def __call__(self, images: Any) -> list[dict[str, Any]]:
        """`boxes`, x0 y0 x1 y1 in the image's own pixels, `labels`, names, and `scores`, in [0, 1], of
        every image, the surest object first.

        Images are asked one by one: in a batch torchvision's detectors fill all up to the size of the
        largest, so that answers would depend on the others, and memory would on their number.

        Raises:
            DataError: an image is none, too large, of another type or range, or the detector fails on
                it, as on a single row of pixels that it shrinks to nothing.
        """
        answers = []
        for row, image in enumerate(read_sent(images, self.shape, smaller=True)):
            try:
                (found,) = self.model([image])
            except ModelError as error:
                height, width = image.shape[1:]
                raise DataError(
                    f"The detector fails on image {row} of {width}x{height} pixels; send it in another "
                    "size, or another one."
                ) from error
            answers.append(
                {
                    "boxes": found["boxes"].tolist(),
                    "labels": [self.classes[label] for label in found["labels"].tolist()],
                    "scores": found["scores"].tolist(),
                }
            )
        return answers
