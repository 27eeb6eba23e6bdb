"""Pictures in files, as uint8: the one reader of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bimask.errors import DataError
from bimask.files.pictures import PICTURES as PICTURES
from bimask.files.pictures import opened_picture, several_frames
from bimask.files.stand_ins import MAX_SIDE

Size = int | tuple[int, int]  # of an image: a square's side, or (height, width), in pixels
IN_16_BITS = ("PNG", "PPM")  # formats whose whole numbers of PIL's mode I are in 0 to 65535


class DataWarning(UserWarning):
    """Pictures that can be used, but are probably not what was meant."""


def height_and_width(size: Size) -> tuple[int, int]:
    """Both sides of an image, in pixels."""
    return (size, size) if isinstance(size, int) else size


def read_picture(path: Path | str, channels: int, image_size: Size | None = None) -> Tensor:
    """One picture as (C, H, W) uint8.

    More than 8 bits are scaled to 8, 16 bits by their whole range, floats in [0, 1] likewise. Colours
    are those of palettes and CMYK; transparency and the orientation in a photograph's EXIF count
    nothing, as in torchvision.

    Args:
        channels: 3, or 1 for grey.
        image_size: what to bring it to, bilinear; None keeps its own.

    Raises:
        DataError: it cannot be read, has several frames or pages, or numbers of no known range.
    """
    try:
        with opened_picture(path) as picture:
            if picture.format != "MPO" and several_frames(picture):  # MPO: a phone's photograph
                raise DataError(
                    f"The picture {path} has several frames or pages, but must have one; save the one "
                    "you mean."
                )
            if image_size is None and max(picture.size) > MAX_SIDE:
                width, height = picture.size
                raise DataError(
                    f"The picture {path} has {width}x{height} pixels, but models take sides of at most "
                    f"{MAX_SIDE}; give an image size to bring it to."
                )
            converted = _in_8_bits(picture, path).convert("RGB" if channels == 3 else "L")
            if image_size is not None:
                height, width = height_and_width(image_size)
                if converted.size != (width, height):
                    converted = converted.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.array(converted)
    except DataError:
        raise
    except Exception as error:  # PIL raises a dozen kinds for a damaged file
        raise unreadable(path, error) from error
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


def picture_size(path: Path | str) -> tuple[int, int]:
    """Height and width of a picture, by its header alone.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with opened_picture(path) as picture:
            width, height = picture.size
    except Exception as error:  # as above
        raise unreadable(path, error) from error
    return height, width


def unreadable(path: Path | str, error: Exception) -> DataError:
    """The refusal of a file that is no picture."""
    return DataError(f"Cannot read the picture {path}: {str(error) or type(error).__name__}.")


def _in_8_bits(picture: Image.Image, path: Path | str) -> Image.Image:
    """The same in a mode that PIL converts without cutting values off."""
    mode = picture.mode
    if mode == "P" and "transparency" in picture.info:
        return picture.convert("RGBA")  # straight to RGB, PIL warns of it
    if mode != "F" and not mode.startswith("I"):
        return picture
    values = np.array(picture)
    least, most = float(values.min()), float(values.max())  # NaN if any is
    if mode.startswith("I;16") or (mode == "I" and picture.format in IN_16_BITS):
        top, kind = 65535, "whole numbers in 0 to 65535"
    elif mode == "F":
        top, kind = 1, "floats in [0, 1]"
    else:
        raise DataError(
            f"The picture {path} has whole numbers of 32 bits, {least:.0f} to {most:.0f}, and nothing "
            "says which is white; save it in 8 or 16 bits."
        )
    if not (least >= 0 and most <= top):
        raise DataError(
            f"The picture {path} has values of {least:g} to {most:g}, but must have {kind}; save it in "
            "8 bits."
        )
    rows = np.empty(values.shape, np.uint8)
    for row, numbers in zip(rows, values, strict=True):  # not all at once: doubles take eight bytes
        row[:] = (numbers.astype(np.float64) * (255 / top)).round()
    return Image.fromarray(rows)
