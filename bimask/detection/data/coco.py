"""Annotations in COCO's JSON (Lin et al. 2014, arXiv 1405.0312), read within bounds."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Annotated as Bounded

from pydantic import BaseModel, FailFast, Field, FiniteFloat, ValidationError

from bimask.detection.data.annotated import Annotated, Listing
from bimask.errors import DataError, describe
from bimask.files.bounded import MAX_JSON_BYTES, parsed_json, read_bytes

MAX_VALUES = 5_000_000  # polygons, which are not looked at, have the most

Id = int | str  # tools write both


class _Picture(BaseModel):
    id: Id
    file_name: str = Field(min_length=1, max_length=4096)


class _Category(BaseModel):
    id: Id
    name: str


class _Object(BaseModel):
    image_id: Id
    category_id: Id
    bbox: Bounded[list[FiniteFloat], Field(min_length=4, max_length=4)]
    iscrowd: bool = False


class _Content(BaseModel):
    # one odd value is enough: millions would be told of otherwise
    images: Bounded[list[_Picture], FailFast(), Field(min_length=1)]
    annotations: Bounded[list[_Object], FailFast()]
    categories: Bounded[list[_Category], FailFast(), Field(min_length=1, max_length=10_000)]


def read_coco(path: Path, pictures: Path | None = None) -> Listing:
    """What a file of annotations says; the classes come in the order of their ids.

    Regions of crowds are left out. So are pictures' sizes, which are those of their files.

    Args:
        pictures: the folder that names of files start from; None is the one of `path`.

    Raises:
        DataError: no such file, no JSON or another one, or an object of no picture or category.
    """
    try:
        found = parsed_json(read_bytes(path, MAX_JSON_BYTES), most_values=MAX_VALUES)
        content = _Content.model_validate(found)
    except ValidationError as error:
        raise DataError(f"{path} holds no annotations in COCO's form: {describe(error)}.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the annotations {path}: {error}.") from error
    categories = sorted(content.categories, key=lambda one: (isinstance(one.id, str), one.id))
    labels = {one.id: label for label, one in enumerate(categories)}
    known = {one.id for one in content.images}
    for what, kinds, listed in (("categories", labels, categories), ("images", known, content.images)):
        if len(kinds) < len(listed):
            raise DataError(f"{path} has two {what} of one id; give each an id of its own.")
    objects, crowds = defaultdict[Id, list[_Object]](list), 0
    for one in content.annotations:
        if one.image_id not in known or one.category_id not in labels:
            odd = "image_id" if one.image_id not in known else "category_id"
            raise DataError(
                f"{path} has an annotation of {odd} {getattr(one, odd)!r}, which is not listed; "
                "list it, or leave the annotation out."
            )
        crowds += one.iscrowd
        if not one.iscrowd:
            objects[one.image_id].append(one)
    folder = path.parent if pictures is None else pictures
    return Listing(
        path,
        tuple(
            Annotated(
                one.file_name,
                folder / _inside(one.file_name, path),
                tuple((x, y, x + w, y + h) for x, y, w, h in (o.bbox for o in objects[one.id])),
                tuple(labels[o.category_id] for o in objects[one.id]),
            )
            for one in content.images
        ),
        tuple(one.name for one in categories),
        (f"{crowds} crowd regions",) if crowds else (),
        tuple(one.id for one in categories),
    )


def _inside(name: str, path: Path) -> PurePosixPath:
    """A picture's place below its folder; a stranger's file shall not name others."""
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts or re.search(r"[\0\\]|^\w:", name):
        raise DataError(
            f"{path} names the picture {name!r}, which may be outside of its folder; "
            "name it from there."
        )
    return place
