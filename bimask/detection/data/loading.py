"""Data sets of detectors by name:

    digit_canvases       made on the spot, see `bimask.detection.data.canvases`
    coco:PATH.json       annotations in COCO's form
    voc:PATH             a folder in VOC's form

Splits are fixed: a set's own, or by the names of its pictures, whatever their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

from bimask.detection.data.annotated import Annotated, Listing, read_listing
from bimask.detection.data.canvases import digit_canvases
from bimask.detection.data.coco import read_coco
from bimask.detection.data.voc import read_voc
from bimask.detection.objects import DetectionSplits
from bimask.errors import DataError

LOADERS: dict[str, Callable[[], DetectionSplits]] = {"digit_canvases": digit_canvases}
COCO, VOC = "coco:", "voc:"
HELD_OUT = 0.15  # of the pictures for `val`, and as many for `test`


def is_files(name: str) -> bool:
    """Whether the data set is a folder of files, which may change."""
    return name.startswith((COCO, VOC))


def check_data(name: str) -> None:
    """Refuse a name that no data set can have; no file is opened.

    Raises:
        DataError: unknown.
    """
    if name not in LOADERS and not is_files(name):
        raise DataError(
            f"Unknown dataset {name!r}; known are {', '.join(sorted(LOADERS))}, coco:PATH.json and "
            "voc:PATH."
        )


def load_detection(
    name: str, *, pictures: Path | None = None, image_size: int | None = None
) -> DetectionSplits:
    """A data set by name.

    Args:
        pictures: the folder of a set's pictures, if it is not where the annotations are.
        image_size: pictures of files with a longer side are shrunk until it has so many pixels.

    Raises:
        DataError: unknown, files that cannot be read or are not what they should be, or less than
            three pictures.
    """
    check_data(name)
    if name in LOADERS:
        return LOADERS[name]()
    listing, parts = _listed(name, pictures)
    everything = [one for part in parts for one in part]
    data = read_listing(replace(listing, pictures=tuple(everything)), image_size)
    rows = iter(range(len(data)))
    return DetectionSplits(*(data.subset([*islice(rows, len(part))]) for part in parts))


def files_digest(name: str, pictures: Path | None = None) -> str:
    """64 hex digits of the annotations and pictures that a set of files is.

    Raises:
        DataError, VictimError: a file cannot be read.
    """
    listing, parts = _listed(name, pictures)
    shares = "|".join(",".join(one.name for one in part) for part in parts)
    return hashlib.sha256(f"{listing.digest}|{shares}".encode()).hexdigest()


def _listed(name: str, pictures: Path | None) -> tuple[Listing, list[list[Annotated]]]:
    """What a set's files say, and the pictures of `train`, `val` and `test`."""
    check_data(name)
    if name.startswith(COCO):
        listing = read_coco(Path(name.removeprefix(COCO)), pictures)
        return listing, _by_name(listing, list(listing.pictures))
    listing, own = read_voc(Path(name.removeprefix(VOC)), pictures)
    if own.keys() >= {"train", "val", "test"}:
        return listing, [own["train"], own["val"], own["test"]]
    if own.keys() >= {"train", "val"}:  # VOC gives out no `test` beside them
        train, *held = _by_name(listing, own["train"])
        return listing, [train, [one for part in held for one in part], own["val"]]
    return listing, _by_name(listing, list(listing.pictures))


def _by_name(listing: Listing, pictures: list[Annotated]) -> list[list[Annotated]]:
    """Three parts by the SHA-256 of the pictures' names, so that no order of a file counts."""
    if len(pictures) < 3:
        raise DataError(
            f"{listing.source} has {len(pictures)} pictures; training, val and test need 3."
        )
    ordered = sorted(pictures, key=lambda one: hashlib.sha256(one.name.encode()).digest())
    held = max(1, round(HELD_OUT * len(ordered)))
    return [ordered[2 * held :], ordered[held : 2 * held], ordered[:held]]
