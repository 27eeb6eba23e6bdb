"""Pictures of strangers: the one place that opens them, and the walk that finds them.

Pillow tells a format by the content and knows some that run a program (EPS starts ghostscript), so
every opening says which formats may be there. A size is looked at before a pixel is decoded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile, UnidentifiedImageError

from bimask.files.bounded import require_regular
from bimask.files.picture_bounds import require_cheap, require_work

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # by content; suffixes decide nothing
MAX_PICTURE_BYTES = 256 * 2**20
MAX_PIXELS = 2**25  # of one picture: 33.5 million, a photograph in 8K


@contextmanager
def opened_picture(
    source: Path | str | BinaryIO, formats: Sequence[str] = FORMATS
) -> Iterator[Image.Image]:
    """A picture whose header alone is read; pixels are decoded by whoever asks for them.

    Args:
        source: a file, or its bytes.
        formats: which may be there, some of `FORMATS`.

    Raises:
        OSError: it cannot be read; also if it is no regular file, which could be without end.
        ValueError: too many bytes or pixels, or none of these formats.
    """
    with ExitStack() as stack:
        if isinstance(source, (str, Path)):
            require_regular(source, MAX_PICTURE_BYTES)
            source = stack.enter_context(open(source, "rb"))
        try:
            require_cheap(source)
            picture = stack.enter_context(Image.open(source, formats=list(formats)))
        except UnidentifiedImageError:
            raise ValueError(f"its content is none of {', '.join(formats)}") from None
        except Image.DecompressionBombError:
            raise ValueError(f"it has more pixels than the {MAX_PIXELS} that are read") from None
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"it has {width}x{height} pixels, but at most {MAX_PIXELS} are read")
        if isinstance(picture, ImageFile.ImageFile) and picture.tile:
            require_work(source, width * height, picture.format, picture.tile[0][0])
        yield picture


def several_frames(picture: Image.Image) -> bool:
    """Whether there is a second frame or page; they are not counted, which can take minutes."""
    if picture.format not in ("GIF", "TIFF"):  # the others' headers say it
        return getattr(picture, "n_frames", 1) > 1
    try:
        picture.seek(1)
    except EOFError:
        picture.seek(0)
        return False
    return True


def class_pictures(root: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """The class folders in `root` by name, and every picture at any depth in them with its label.

    The order is that of torchvision's `ImageFolder`. Links are followed, but no folder is entered twice
    for a class, and never `root` or a class by a link from inside: a walk would not end there.

    Raises:
        OSError: no class folder, or one without a picture.
    """
    homes = sorted(entry.path for entry in os.scandir(root) if entry.is_dir())
    classes = tuple(os.path.basename(home) for home in homes)
    if not homes:
        raise FileNotFoundError(f"there is no class folder in {root}")
    above = {_identity(str(root)), *map(_identity, homes)}
    samples: list[tuple[str, int]] = []
    for label, home in enumerate(homes):
        before, seen, found = len(samples), set(above), []
        for folder, inner, names in os.walk(home, followlinks=True):
            inner.sort()
            kept = []
            for name in inner:
                if (identity := _identity(os.path.join(folder, name))) not in seen:
                    seen.add(identity)
                    kept.append(name)
            inner[:] = kept
            found.append((folder, sorted(names)))
        for folder, names in sorted(found):
            samples += [
                (os.path.join(folder, name), label) for name in names if name.lower().endswith(PICTURES)
            ]
        if len(samples) == before:
            raise FileNotFoundError(f"the class folder {home} holds no picture ({', '.join(PICTURES)})")
    return classes, samples


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
