"""What a file of a picture may cost, seen in its structure before Pillow opens it.

A few bytes can ask for minutes: a JPEG of thousands of scans, each over all pixels; millions of empty
chunks, which Pillow goes through one by one; formats whose decoder is Python. Pixels are bounded in
`bimask.files.pictures`; here is what is counted beside them. Sound pictures are far below all of it.
"""

from __future__ import annotations

import re
import struct
from typing import BinaryIO

MAX_PARTS = 100_000  # of a file: chunks, segments, strips
MAX_WORK = 2**31  # pixels that are decoded, once a scan: about 2 s
MAX_SLOW_PIXELS, MAX_SLOW_BYTES = 2**19, 4 * 2**20  # where the decoder is Python
MAX_HEADER = 4096  # bytes of a PPM up to its pixels

SOI, SOS, EOI = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
PNG = b"\x89PNG\r\n\x1a\n"
TIFF = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
OF_PARTS = (273, 279, 324, 325)  # tags of a TIFF: offsets and sizes of strips, of tiles
JPEG_IN_TIFF = (6, 7)


def require_cheap(file: BinaryIO) -> None:
    """Refuse a picture by its structure; its pixels are not looked at.

    Args:
        file: is left at its beginning.

    Raises:
        ValueError: it has more parts than are read.
    """
    start = file.read(8)
    if start.startswith(SOI):
        _require_jpeg(file)
    elif start == PNG:
        _require_png(file)
    elif start[:4] in TIFF:
        _require_tiff(file, TIFF[start[:4]], big=start[2:3] == b"+" or start[3:4] == b"+")
    elif re.match(rb"P[0-9Ff][\s#]", start):
        _require_ppm(file)
    file.seek(0)


def require_work(file: BinaryIO, pixels: int, kind: str | None, decoder: str) -> None:
    """Refuse a picture by what the decoding of its pixels takes.

    Args:
        kind: Pillow's name of its format, and its `decoder`.

    Raises:
        ValueError: too much.
    """
    place = file.tell()
    size = file.seek(0, 2)
    if decoder in ("ppm_plain", "bmp_rle"):
        if pixels > MAX_SLOW_PIXELS or size > MAX_SLOW_BYTES:
            raise ValueError(
                f"{kind} in its slow form with {pixels} pixels and {size} bytes, but at most "
                f"{MAX_SLOW_PIXELS} and {MAX_SLOW_BYTES} are read"
            )
    elif kind in ("JPEG", "MPO"):
        file.seek(0)
        scans = file.read().count(SOS)
        if scans * pixels > MAX_WORK:
            raise ValueError(
                f"{pixels} pixels in {scans} scans, but at most {MAX_WORK // pixels} are read"
            )
    file.seek(place)


def _too_many(parts: str) -> ValueError:
    return ValueError(f"more than {MAX_PARTS} {parts}, which is all that is read")


def _require_jpeg(file: BinaryIO) -> None:
    """Count what stands before the first scan; bytes that only fill up, too."""
    file.seek(2)
    for _ in range(MAX_PARTS):
        mark = file.read(2)
        if len(mark) < 2 or mark[:1] != b"\xff" or mark in (SOS, EOI):
            return
        if mark == b"\xff\xff":
            file.seek(-1, 1)
        elif not 0xD0 <= mark[1] <= 0xD9:
            length = int.from_bytes(file.read(2), "big")
            file.seek(max(0, length - 2), 1)
    raise _too_many("segments")


def _require_png(file: BinaryIO) -> None:
    for _ in range(MAX_PARTS):
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        file.seek(int.from_bytes(head[:4], "big") + 4, 1)
    raise _too_many("chunks")


def _require_tiff(file: BinaryIO, order: str, *, big: bool) -> None:
    """Look at the first page's table: how many strips or tiles, and scans where they are JPEG."""
    try:
        (place,) = struct.unpack(f"{order}Q", file.read(8)) if big else (0,)
        if not big:
            file.seek(4)
            (place,) = struct.unpack(f"{order}I", file.read(4))
        file.seek(place)
        count, row = ("Q", "HHQQ") if big else ("H", "HHII")
        (entries,) = struct.unpack(f"{order}{count}", file.read(struct.calcsize(f"{order}{count}")))
        if entries > MAX_PARTS:
            raise _too_many("tags")
        table = file.read(entries * struct.calcsize(f"{order}{row}"))
        found = {
            tag: (number, value) for tag, _, number, value in struct.iter_unpack(order + row, table)
        }
    except (struct.error, OSError, OverflowError):
        return  # Pillow says what is wrong
    if any(found.get(tag, (0, 0))[0] > MAX_PARTS for tag in OF_PARTS):
        raise _too_many("strips or tiles")
    in_header = found.get(259, (0, 0))[1]
    if {in_header & 0xFFFF, in_header >> 16 & 0xFFFF} & set(JPEG_IN_TIFF):
        parts = max(found.get(273, (1, 0))[0], found.get(324, (1, 0))[0])
        file.seek(0)
        if file.read().count(SOS) > 64 * parts:
            raise ValueError("more than 64 scans a strip or tile, which is all that is read")


def _require_ppm(file: BinaryIO) -> None:
    file.seek(0)
    head = re.sub(rb"#[^\r\n]*[\r\n]", b" ", file.read(MAX_HEADER))
    if not re.match(rb"P\S\s+[^\s#]+\s+[^\s#]+\s", head):
        raise ValueError(f"its size is not in its first {MAX_HEADER} bytes")
