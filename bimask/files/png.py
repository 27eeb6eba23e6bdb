"""Pictures beside a checkpoint: their paths re-rooted below its folder, their decoding kept to PNG."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from bimask.errors import InteropError
from bimask.files.pictures import opened_picture
from bimask.files.stand_ins import MAX_SIDE, shown

MAX_PICTURES = 200_000
MAX_IMAGE_BYTES = 8 * 2**30  # of all decoded images of one set
ROOTS = ("bd_test_dataset", "bd_train_dataset")  # BackdoorBench's folders of pictures
MODES = {1: "L", 3: "RGB"}


def check_extent(count: int, channels: int, height: int, width: int) -> None:
    """Refuse a set of images that would not fit, before one is read.

    Raises:
        InteropError: no or too many images, odd channels, sides out of range.
    """
    if channels not in MODES or not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise InteropError(
            f"Images of {shown(height)}x{shown(width)} with {shown(channels)} channels were "
            f"declared, but 1 or 3 channels and sides of 1 to {MAX_SIDE} are read."
        )
    if not 1 <= count <= MAX_PICTURES or count * channels * height * width > MAX_IMAGE_BYTES:
        raise InteropError(
            f"{count} images of {height}x{width} were declared, but 1 to {MAX_PICTURES} with at most "
            f"{MAX_IMAGE_BYTES} bytes in all are read."
        )


def reroot(stored: object, folder: Path) -> Path:
    """Where a picture of a checkpoint in `folder` is.

    A stored path is relative to the working directory of the program that wrote it. Its last
    `bd_test_dataset` or `bd_train_dataset` and what follows is taken below `folder`; links are
    followed, and the end must be below `folder` too.

    Raises:
        InteropError: no such part, `..` behind it, or a path that leaves the folder.
    """
    if not isinstance(stored, str) or "\0" in stored:
        raise InteropError(f"The path of a picture must be a string, got {shown(stored)}.")
    parts = PurePosixPath(stored.replace("\\", "/")).parts
    roots = [place for place, part in enumerate(parts) if part in ROOTS]
    if not roots or ".." in parts[roots[-1] :]:
        raise InteropError(
            f"The path {shown(stored)} of a picture is refused: below {' or '.join(ROOTS)}, and "
            "without `..`, is where pictures are."
        )
    return inside(folder.joinpath(*parts[roots[-1] :]), folder)


def inside(path: Path, folder: Path) -> Path:
    """`path` with links followed, if that is below `folder`.

    Raises:
        InteropError: it is not.
    """
    try:
        real = path.resolve()
        if real.is_relative_to(folder.resolve()):
            return real
    except (OSError, RuntimeError, ValueError):  # a ring of links
        pass
    raise InteropError(f"{path} leads out of {folder}, and files beside it are not read.")


def read_png(path: Path, *, channels: int, height: int, width: int) -> Tensor:
    """A PNG of exactly this shape: (C, H, W) uint8.

    Raises:
        InteropError: missing, not a regular file, too large, not a PNG, of another size or mode.
    """
    limit = 2 * channels * height * width + 2**16  # noise does not compress; 64 KiB for its headers
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise InteropError(
                f"{path} is no picture of {height}x{width}: no file, or above {limit} bytes."
            )
        with opened_picture(path, ["PNG"]) as picture:  # reads the header only
            if picture.size != (width, height) or picture.mode != MODES[channels]:
                raise InteropError(
                    f"{path} is {picture.size[1]}x{picture.size[0]} in mode {picture.mode}, but "
                    f"{height}x{width} in mode {MODES[channels]} was declared."
                )
            rows = np.array(picture)
    except FileNotFoundError:
        raise InteropError(
            f"The picture {path} is missing; copy the whole folder of the checkpoint."
        ) from None
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        raise InteropError(
            f"{path} cannot be read as a PNG ({type(error).__name__}); get another copy of it."
        ) from error
    return torch.from_numpy(rows).view(height, width, channels).permute(2, 0, 1)
