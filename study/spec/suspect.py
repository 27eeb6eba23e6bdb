"""A study's subject whose trigger nobody knows: the user's own model and clean pictures, nothing else.

Some pictures of every class are the defence's; the others are held back, in turn to choose on (`val`:
accuracy and the probe) and to report on (`test`: accuracy).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import nn

from bimask.data import ImageData, Splits
from bimask.errors import BimaskError, DataError, VictimError, VictimRefusedError
from bimask.inspection.suspect import PICTURES, load_suspect, read_clean
from bimask.metrics import CleanScores, CleanSet, Split, evaluate
from bimask.nets import check_net, is_own, source_of
from bimask.nets.weights import file_sha256
from bimask.victims import Victim

NAME = "suspect"  # in records, files and charts, where victims have theirs
NEEDS_VICTIMS = ("victims", "held_out", "controls", "confirm", "gates")  # keys of a study
SIDES = range(4, 1025)  # of an image, in pixels
HELD_BACK = 2  # pictures of a class at least: one to choose on, one to report on


class SuspectSpec(BaseModel):
    """Which model is in doubt, and what its user has; the keys are options of `bimask purify`.

    Paths are as seen from the working directory. The factory of an own net is imported and run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="weights: safetensors, or of torch.save, whatever the file's name")
    net: str = Field(description="FILE.py:factory, package.module:factory or a name")
    clean: str = Field(description="folder of clean pictures in class folders")
    image_size: int | tuple[int, int] | None = Field(
        None, description="pixels to bring pictures to: one number, or [height, width]"
    )
    channels: Literal[1, 3] = 3
    width: int | None = Field(None, ge=1, description="of the net, where it takes one")
    mean: list[float] | None = Field(None, description="of the normalisation, one value a channel")
    std: list[float] | None = None
    min_clean_accuracy: float = Field(0.5, ge=0, le=1, description="of the suspect itself, on val")
    sha256: str | None = Field(
        None, description="of weights, code and pictures; filled in unless given"
    )

    @field_validator("image_size", mode="before")
    @classmethod
    def _sides(cls, given: Any) -> int | tuple[int, int] | None:
        """One sentence for whatever is neither, which a union would have one a type for."""
        sides = list(given) if isinstance(given, (list, tuple)) else [given, given]
        if given is None:
            return None
        if len(sides) != 2 or not all(type(side) is int and side in SIDES for side in sides):
            raise ValueError(
                f"must be one number of pixels or [height, width], {SIDES[0]} to {SIDES[-1]}, "
                f"got {given!r}"
            )
        height, width = sides
        return height if height == width else (height, width)

    @model_validator(mode="before")
    @classmethod
    def _stamped(cls, given: Any) -> Any:
        """Files go into the digest by their content, so that it can be had without them later."""
        keys = ("model", "net", "clean")
        if (
            not isinstance(given, dict)
            or given.get("sha256") is not None
            or not all(isinstance(given.get(key), str) for key in keys)
        ):
            return given
        try:
            return given | {"sha256": _sha256(*(given[key] for key in keys))}
        except BimaskError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _both_or_neither(self) -> SuspectSpec:
        if (self.mean is None) != (self.std is None):
            raise ValueError("a mean needs a standard deviation and the other way round; give both")
        return self

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the model and the pictures; files count by their content."""
        deciding = self.model_dump(exclude={"model", "clean", "min_clean_accuracy"})
        if is_own(self.net):
            deciding["net"] = self.net.rpartition(":")[2]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def options(self) -> str:
        """The same for `python -m bimask purify`."""
        words = []
        for name, value in self.model_dump(exclude={"min_clean_accuracy", "sha256"}).items():
            if value is not None and value != type(self).model_fields[name].default:
                text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                text = "x".join(map(str, value)) if isinstance(value, tuple) else text
                words += [f"--{name.replace('_', '-')}", shlex.quote(text)]
        return " ".join(words)

    def load(self, for_defence: int) -> SuspectModel:
        """The model and how accurate it is.

        Args:
            for_defence: pictures of every class that are the defence's.

        Raises:
            DataError: pictures that are too few, in no class folders, or cannot be read.
            VictimError: weights that do not fit; files that changed since the spec was made.
            VictimRefusedError: it is less accurate than `min_clean_accuracy`.
            SettingError: the net cannot be made.
            ModelError: the model cannot be defended as it is.
        """
        if _sha256(self.model, self.net, self.clean) != self.sha256:
            raise VictimError(
                f"Weights, code or pictures of the suspect {self.model} changed since the study began; "
                "put the old ones back, or start a new study."
            )
        splits = self.load_data(for_defence)
        own = load_suspect(
            Path(self.model),
            self.net,
            Path(self.clean),
            channels=self.channels,
            image_size=self.image_size,
            width=self.width,
            mean=self.mean,
            std=self.std,
        )
        sets = CleanSet(splits.val, "val"), CleanSet(splits.test, "test")
        scores: dict[Split, CleanScores] = {one.split: evaluate(own.model, one) for one in sets}
        if (accuracy := scores["val"].clean_accuracy) < self.min_clean_accuracy:
            raise VictimRefusedError(
                f"The suspect {self.model} answers {accuracy:.3f} of the held-back pictures right "
                f"(`min_clean_accuracy` is {self.min_clean_accuracy:g}); are `mean`, `std` and the "
                "order of the class folders those of its training?"
            )
        return SuspectModel(self, own.model, own.classes, scores, for_defence, own.notes)

    def load_data(self, for_defence: int) -> Splits:
        """The pictures: `train` is the defence's, `val` to choose on, `test` to report on."""
        images, names = read_clean(Path(self.clean), channels=self.channels, image_size=self.image_size)
        if names is None or images.labels is None:
            raise DataError(
                f"The pictures in {self.clean} are in no class folders, so no accuracy can be "
                "measured; put them into folders, one a class, in the order of the model's classes."
            )
        return shared_out(ImageData(images.images, images.labels, names), for_defence)


@dataclass(frozen=True)
class SuspectModel:
    """A model in doubt in a victim's place: without an attack, hence without its scores.

    Attributes:
        model: images in [0, 1] -> logits, in eval mode.
        scores: of the suspect itself, on "val" and "test".
        for_defence: pictures of every class that are the defence's.
        notes: sentences on what was done about the model while it was loaded.
    """

    spec: SuspectSpec
    model: nn.Module
    classes: tuple[str, ...]
    scores: dict[Split, CleanScores]
    for_defence: int
    notes: tuple[str, ...] = ()

    def load_data(self) -> Splits:
        """The pictures, read anew."""
        return self.spec.load_data(self.for_defence)

    def eval_sets(self, splits: Splits, split: Split) -> CleanSet:
        """The held-back pictures of one split."""
        return CleanSet(splits.val if split == "val" else splits.test, split)


Subject = Victim | SuspectModel  # what a study purifies


def beside_problems(study: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Place and sentence of what cannot stand in a study: it has either victims or a suspect, and
    beside a suspect nothing that needs a known trigger."""
    if study.get("suspect") is None:
        empty = "is empty; list one victim or more, or give a `suspect`, a model of your own"
        return [("victims", empty)] if study.get("victims") == [] else []
    needs = "needs a known trigger, and of a suspect nobody knows one"
    found = [
        (key, f"{needs}; leave out `{key}` or `suspect`") for key in NEEDS_VICTIMS if study.get(key)
    ]
    if study.get("selection", "blind") == "oracle":
        found.append(("selection", f"oracle {needs}; say blind"))
    return found


def shared_out(data: ImageData, for_defence: int) -> Splits:
    """`for_defence` pictures of every class to `train`, the others in turn to `val` and `test`.

    Within a class the order is that of the SHA-256 of the pixels: neither names nor dates decide, and
    of equal pictures one counts, so none is on two sides.

    Raises:
        DataError: a class has too few.
    """
    rows: dict[str, list[list[int]]] = {"train": [], "val": [], "test": []}
    keys = [hashlib.sha256(image.contiguous().numpy().data).digest() for image in data.images]
    for label, name in enumerate(data.classes):
        distinct = {keys[row]: row for row in (data.labels == label).nonzero().flatten().tolist()}
        order = [distinct[key] for key in sorted(distinct)]
        if len(order) < for_defence + HELD_BACK:
            raise DataError(
                f"Class {name!r} has {len(order)} distinct clean pictures, but {for_defence} are the "
                f"defence's and {HELD_BACK} or more must be held back to measure on; add pictures, or "
                "lower `clean_images_per_class`."
            )
        rest = order[for_defence:]
        for part, found in zip(rows, (order[:for_defence], rest[::2], rest[1::2]), strict=True):
            rows[part].append(found)
    return Splits(*(data.subset(torch.tensor([*itertools.chain(*found)])) for found in rows.values()))


def _sha256(model: str, net: str, clean: str) -> str:
    """Of the weights, of an own net's file, and of every picture with its place."""
    check_net(net)
    if not Path(clean).is_dir():
        raise DataError(f"There is no folder {clean}; give one of clean pictures.")
    files = [Path(model), *([Path(source_of(net))] if is_own(net) else [])]
    pictures = sorted(p for p in Path(clean).rglob("*") if p.suffix.lower() in PICTURES)
    content = hashlib.sha256()
    for file in files:
        content.update(file_sha256(file).encode())
    for picture in pictures:
        content.update(f"{picture.relative_to(clean).as_posix()} {file_sha256(picture)}".encode())
    return content.hexdigest()
