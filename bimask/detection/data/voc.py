"""Annotations in Pascal VOC's XML, read within bounds (Everingham et al. 2010, IJCV 88)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from bimask.detection.data.annotated import Annotated, Listing
from bimask.errors import DataError
from bimask.files.bounded import MAX_DEPTH, read_bytes
from bimask.files.pictures import PICTURES

MAX_XML_BYTES = 4 * 2**20  # of one picture's file
MAX_LIST_BYTES = 16 * 2**20
SPLITS = ("train", "val", "test")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(folder: Path, pictures: Path | None = None) -> tuple[Listing, dict[str, list[Annotated]]]:
    """What the XML files in a folder say, and the splits that it comes with, if any.

    The folder is one of VOC, with `Annotations/` and `JPEGImages/` and perhaps lists in
    `ImageSets/Main/`, or one with XML files in it. A picture is the file with the same name before the
    suffix; what the XML says of its place is not asked. Classes are in the order of their names, and
    objects that are marked as difficult are left out.

    Args:
        pictures: the folder of the pictures; None is `JPEGImages/`, or the one of the XML files.

    Raises:
        DataError: no such folder, no XML file or a broken one, no picture of its name.
    """
    plain = not (folder / "Annotations").is_dir()
    home = folder if plain else folder / "Annotations"
    if pictures is None:
        pictures = folder if plain else folder / "JPEGImages"
    try:
        files = sorted(Path(entry.path) for entry in os.scandir(home))
        beside = {
            Path(entry.name).stem: Path(entry.path)
            for entry in os.scandir(pictures)
            if entry.name.lower().endswith(PICTURES)
        }
    except OSError as error:
        raise DataError(f"Cannot read the folder {error.filename}: {error.strerror}.") from error
    files = [path for path in files if path.suffix.lower() == ".xml"]
    if not files:
        raise DataError(f"There are no XML files in {home}; voc:PATH needs a folder of VOC's form.")
    found, difficult = {}, 0
    for path in files:
        if path.stem not in beside:
            raise DataError(
                f"There is no picture of {path} in {pictures}; it must have the same name before its "
                "suffix."
            )
        objects = list(_objects(path))
        difficult += sum(hard for *_, hard in objects)
        found[path.stem] = [(name, box) for name, box, hard in objects if not hard]
    classes = sorted({name for objects in found.values() for name, _ in objects})
    labels = {name: label for label, name in enumerate(classes)}
    annotated = {
        stem: Annotated(
            stem,
            beside[stem],
            tuple(box for _, box in objects),
            tuple(labels[name] for name, _ in objects),
        )
        for stem, objects in found.items()
    }
    left_out = (f"{difficult} objects marked as difficult",) if difficult else ()
    listing = Listing(folder, tuple(annotated.values()), tuple(classes), left_out)
    return listing, _own_splits(folder, annotated)


def parsed_xml(content: bytes) -> Element:
    """The root of an XML text. A declaration of its type is refused: by its entities, a few bytes stand
    for any number of them, or for files.

    Raises:
        ValueError: no XML, one with such a declaration, or nested too deep.
    """
    tree, reader, depth = TreeBuilder(), expat.ParserCreate(), 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        tree.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        tree.end(tag)

    def refuse(*_: object) -> None:
        raise ValueError("it declares its document type, and entities are not read")

    reader.StartElementHandler, reader.EndElementHandler = start, end
    reader.CharacterDataHandler = tree.data
    reader.StartDoctypeDeclHandler = reader.EntityDeclHandler = refuse
    try:
        reader.Parse(content, True)
    except (expat.ExpatError, LookupError) as error:
        raise ValueError(f"no XML ({error})") from error
    return tree.close()


def _objects(path: Path) -> Iterator[tuple[str, tuple[float, float, float, float], bool]]:
    """Name, box and whether it is difficult, of each object in a file."""
    try:
        for one in parsed_xml(read_bytes(path, MAX_XML_BYTES)).iter("object"):
            name = (one.findtext("name") or "").strip()
            corners = [float(one.findtext(f"bndbox/{corner}") or "nan") for corner in CORNERS]
            if not name or not all(map(isfinite, corners)):
                raise ValueError("an object without `name` or a number of `bndbox`")
            x0, y0, x1, y1 = corners
            # VOC counts pixels from 1, and the last one is inside
            hard = (one.findtext("difficult") or "0").strip() == "1"
            yield name, (x0 - 1, y0 - 1, x1, y1), hard
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the annotations {path}: {error}.") from error


def _own_splits(folder: Path, annotated: dict[str, Annotated]) -> dict[str, list[Annotated]]:
    """The lists in `ImageSets/Main/` by name, those that are there."""
    splits = {}
    for split in SPLITS:
        path = folder / "ImageSets" / "Main" / f"{split}.txt"
        if not path.exists():
            continue
        try:
            named = read_bytes(path, MAX_LIST_BYTES).decode().split("\n")
        except (OSError, ValueError) as error:
            raise DataError(f"Cannot read the list {path}: {error}.") from error
        stems = [stem for line in named if (stem := re.split(r"\s+", line.strip())[0])]
        if missing := [stem for stem in stems if stem not in annotated]:
            raise DataError(
                f"{path} lists {missing[0]!r}, which has no XML file in {folder / 'Annotations'}."
            )
        splits[split] = [annotated[stem] for stem in dict.fromkeys(stems)]
    return splits
