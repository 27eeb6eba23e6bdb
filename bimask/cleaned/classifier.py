"""Pictures in, classes and probabilities out, or one sentence on what is wrong with them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bimask.errors import DataError
from bimask.files.pictures import opened_picture
from bimask.nets.answers import logits_of

MOST_IMAGES = 1024  # in one request
MOST_CHARACTERS = 32 * 2**20  # of one base64 picture


class Classifier:
    """A model that is asked from outside.

    An image is one of
        an array (H, W, C), or (H, W) for grey ones, nested lists or numpy: whole numbers are taken as
            0 to 255, others must lie in [0, 1];
        a PNG as base64 text, of that size.

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
            DataError: naming the first image that is none, or of another shape, type or range. Of what
                is in it the sentence has types and shapes alone.
        """
        if not isinstance(images, (list, tuple)):
            raise DataError(f"Give a list of images, got {type(images).__name__}.")
        if not 1 <= len(images) <= MOST_IMAGES:
            raise DataError(f"Give 1 to {MOST_IMAGES} images at once, got {len(images)}.")
        rows = [self._image(position, image) for position, image in enumerate(images)]
        probabilities = logits_of(self.model, torch.stack(rows)).softmax(1)
        return [
            {
                "class": self.classes[int(row.argmax())],
                "probabilities": dict(zip(self.classes, row.tolist(), strict=True)),
            }
            for row in probabilities
        ]

    def _image(self, position: int, image: Any) -> Tensor:
        """(C, H, W) float32 in [0, 1] of one image as it came."""
        place = f"Image {position}"
        if isinstance(image, str):
            return self._png(place, image)
        if not isinstance(image, (list, np.ndarray)):
            raise DataError(
                f"{place} must be nested lists of numbers or a PNG as base64 text, got "
                f"{type(image).__name__}."
            )
        pixels = image if isinstance(image, np.ndarray) else _array(place, image)
        if pixels.dtype.kind not in "uif":
            raise DataError(f"{place} must hold numbers, got {pixels.dtype}.")
        channels, height, width = self.shape
        if pixels.shape == (height, width) and channels == 1:
            pixels = pixels[..., None]
        if pixels.shape != (height, width, channels):
            raise DataError(
                f"{place} must have the shape (height, width, channels) = "
                f"{(height, width, channels)}, got {pixels.shape}."
            )
        whole = pixels.dtype.kind in "ui"
        top = 255 if whole else 1
        if not ((pixels >= 0) & (pixels <= top)).all():  # so NaN is refused, too
            kind = "whole numbers in 0 to 255" if whole else "numbers in [0, 1]"
            raise DataError(
                f"{place} must hold {kind}, got others; images of whole numbers are 0 to 255, all "
                "others [0, 1]."
            )
        return torch.from_numpy(pixels.astype(np.float32) / top).permute(2, 0, 1)

    def _png(self, place: str, text: str) -> Tensor:
        channels, height, width = self.shape
        if len(text) > MOST_CHARACTERS:
            raise DataError(f"{place} has {len(text)} characters, {MOST_CHARACTERS} are allowed.")
        try:
            raw = base64.b64decode("".join(text.split()), validate=True)
        except ValueError as error:
            raise DataError(f"{place} is text, but no base64; encode a PNG.") from error
        try:
            with opened_picture(io.BytesIO(raw), ["PNG"]) as picture:
                size = picture.size  # the header alone is read so far
                if size == (width, height):
                    pixels = np.array(picture.convert("RGB" if channels == 3 else "L"))
        except Exception as error:  # PIL raises half a dozen kinds for a damaged file
            raise DataError(f"{place} is base64, but no PNG that can be read.") from error
        if size != (width, height):
            raise DataError(f"{place} must be {width}x{height} pixels, got {size[0]}x{size[1]}.")
        pixels = pixels.reshape(height, width, -1)
        return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def _array(place: str, image: list[Any]) -> np.ndarray[Any, Any]:
    """Nested lists of numbers as an array.

    numpy alone would make an array of text of them, in which every item is as long as the longest.
    """
    items, kinds = image, set(map(type, image))
    while kinds == {list}:
        items = list(chain.from_iterable(items))
        kinds = set(map(type, items))
    if list in kinds:
        raise DataError(f"{place} is no array of numbers: its rows are of unequal length.")
    if any(kind is bool or not issubclass(kind, (int, float, np.number)) for kind in kinds):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise DataError(f"{place} must hold numbers, got {names}.")
    try:
        return np.asarray(image)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"{place} is no array of numbers: its rows are of unequal length, or nested too deeply."
        ) from error
