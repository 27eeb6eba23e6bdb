"""Images as a request has them, arrays or PNGs in base64, or one sentence on what is wrong."""

from __future__ import annotations

import base64
import io
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bimask.errors import DataError
from bimask.files.pictures import opened_picture

MOST_IMAGES = 1024  # in one request
MOST_CHARACTERS = 32 * 2**20  # of one base64 picture


def read_sent(images: Any, shape: tuple[int, int, int], *, smaller: bool = False) -> list[Tensor]:
    """Images that somebody sent, (C, H, W) float32 in [0, 1] each.

    An image is one of
        an array (H, W, C), or (H, W) for grey ones, nested lists or numpy: whole numbers are taken as
            0 to 255, others must lie in [0, 1];
        a PNG as base64 text. Its size is looked at before a pixel is decoded.

    Args:
        shape: that every image must have.
        smaller: whether height and width may be less.

    Raises:
        DataError: naming the first image that is none, or of another shape, type or range. Of what is
            in it the sentence has types and shapes alone.
    """
    if not isinstance(images, (list, tuple)):
        raise DataError(f"Give a list of images, got {type(images).__name__}.")
    if not 1 <= len(images) <= MOST_IMAGES:
        raise DataError(f"Give 1 to {MOST_IMAGES} images at once, got {len(images)}.")
    return [_image(f"Image {row}", image, shape, smaller) for row, image in enumerate(images)]


def _fits(size: tuple[int, ...], shape: tuple[int, int, int], smaller: bool) -> bool:
    """Whether a height and a width are those of a shape."""
    if smaller:
        return all(1 <= side <= most for side, most in zip(size, shape[1:], strict=True))
    return size == shape[1:]


def _image(place: str, image: Any, shape: tuple[int, int, int], smaller: bool) -> Tensor:
    if isinstance(image, str):
        return _png(place, image, shape, smaller)
    if not isinstance(image, (list, np.ndarray)):
        raise DataError(
            f"{place} must be nested lists of numbers or a PNG as base64 text, got "
            f"{type(image).__name__}."
        )
    pixels = image if isinstance(image, np.ndarray) else _array(place, image)
    if pixels.dtype.kind not in "uif":
        raise DataError(f"{place} must hold numbers, got {pixels.dtype}.")
    channels, height, width = shape
    if pixels.ndim == 2 and channels == 1 and _fits(pixels.shape, shape, smaller):
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] != channels or not _fits(pixels.shape[:2], shape, smaller):
        raise DataError(
            f"{place} must have the shape (height, width, channels) = {(height, width, channels)}"
            f"{' or less in height and width' if smaller else ''}, got {pixels.shape}."
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


def _png(place: str, text: str, shape: tuple[int, int, int], smaller: bool) -> Tensor:
    channels, height, width = shape
    if len(text) > MOST_CHARACTERS:
        raise DataError(f"{place} has {len(text)} characters, {MOST_CHARACTERS} are allowed.")
    try:
        raw = base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise DataError(f"{place} is text, but no base64; encode a PNG.") from error
    try:
        with opened_picture(io.BytesIO(raw), ["PNG"]) as picture:
            wide, high = picture.size  # the header alone is read so far
            fits = _fits((high, wide), shape, smaller)
            if fits:
                pixels = np.array(picture.convert("RGB" if channels == 3 else "L"))
    except Exception as error:  # PIL raises half a dozen kinds for a damaged file
        raise DataError(f"{place} is base64, but no PNG that can be read.") from error
    if not fits:
        raise DataError(
            f"{place} must be {width}x{height} pixels{' or less' if smaller else ''}, got "
            f"{wide}x{high}."
        )
    pixels = pixels.reshape(high, wide, -1)
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
