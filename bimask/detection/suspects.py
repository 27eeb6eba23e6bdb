"""A detector in doubt as its user has it: a factory, a file of weights, annotated clean pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from bimask.detection.data.annotated import Listing, read_listing
from bimask.detection.data.coco import read_coco
from bimask.detection.data.voc import read_voc
from bimask.detection.nets.detector import Detector, label_ids_of, outputs_of
from bimask.detection.nets.named import check_detector
from bimask.detection.nets.spec import DetectorNetSpec
from bimask.detection.objects import DetectionData
from bimask.errors import DataError, ModelError, SettingError, VictimError, describe
from bimask.files.stand_ins import shown
from bimask.nets.admission import HALF
from bimask.nets.weights import file_sha256, put_weights, state_dicts

FEWEST = 10  # pictures with objects, to learn on
ASKED = 2  # pictures that a net must answer before anything is learned
SHOWN = 10  # classes in a sentence
IN_SINGLE = "The weights are in half precision; the defence computes in single precision."


@dataclass(frozen=True)
class Suspect:
    """A detector in doubt, and the clean pictures to look at it with.

    Attributes:
        spec: which net it is, with what it calls each class.
        model: in eval mode.
        clean: what the defender has.
        weights_sha256: of the file that the weights came from; None for a victim's.
        victim: digest of the victim that it is, or None.
        notes: sentences on what was decided while it was loaded, for people.
    """

    spec: DetectorNetSpec
    model: Detector
    clean: DetectionData
    weights_sha256: str | None
    victim: str | None = None
    notes: tuple[str, ...] = ()


def load_suspect(
    weights: Path,
    net: str,
    clean: Path,
    *,
    pictures: Path | None = None,
    outputs: int | None = None,
    label_ids: Sequence[int] | None = None,
    width: int | None = None,
    image_size: int | None = None,
) -> Suspect:
    """Build a user's own detector and read the user's own pictures; the factory is imported and run.

    Args:
        weights: a file as of `bimask.nets.weights.read_weights`, whatever its name.
        net: `small_fcos`, `torchvision:NAME`, `package.module:factory` or `path/to/file.py:factory`.
        clean: annotations in COCO's JSON, or a folder in VOC's form.
        pictures: their folder, if it is another than the annotations'.
        outputs: what the net is told of its number of classes, where it is not the data's.
        label_ids: what the net calls each class, in the order of the data's; None leaves it to
            torchvision's conventions, then to the ids of COCO's categories.
        image_size: pixels that longer sides of pictures are brought to, told a factory that takes it.

    Raises:
        DataError: annotations or pictures that cannot be read, or too few of them.
        SettingError: the net cannot be made, or labels that it does not have.
        VictimError: weights that cannot be read, do not fit, or answer with no numbers.
        ModelError: it is no detector.
    """
    check_detector(net)
    listing = read_coco(clean, pictures) if not clean.is_dir() else read_voc(clean, pictures)[0]
    filled = sum(bool(one.boxes) for one in listing.pictures)
    if filled < FEWEST:
        raise DataError(
            f"{clean} has {filled} pictures with an object in them, {FEWEST} or more are needed to "
            "learn on; give more, a hundred are usual."
        )
    count = len(listing.classes)
    if label_ids is not None and len(label_ids) != count:
        raise SettingError(
            f"{len(label_ids)} labels of the net were given, but {clean} has {count} classes "
            f"({_few([*map(shown, listing.classes)])}); give one for each, in this order."
        )
    found = state_dicts(weights)
    asked = {"net": net, "width": width, "image_size": image_size, "outputs": outputs}
    try:  # its labels are told below, once the net is there to be asked
        spec = DetectorNetSpec.model_validate(asked | {"label_ids": range(count)})
    except ValidationError as error:
        raise SettingError(describe(error)) from error
    model = spec.fresh_net(count).eval()
    half = any(value.dtype in HALF for value in model.parameters())
    try:
        taken = put_weights(model.net, found, weights)
    except VictimError as error:
        told = count if outputs is None else outputs
        raise VictimError(
            f"{str(error).removesuffix('.')}. The net was made for {told} classes; if it was trained "
            "for another number, give that (--classes)."
        ) from error
    model = model.float()
    data = read_listing(listing, image_size)
    shown_first = data.subset([row for row, t in enumerate(data.targets) if len(t["labels"])][:ASKED])
    if not len(shown_first):
        raise DataError(f"No box of {clean} has a whole pixel inside of its picture; mend the boxes.")
    _require_objects(model, shown_first, weights)
    ids, said = _label_ids(model, listing, label_ids)
    spec = spec.model_copy(update={"label_ids": ids})
    model = Detector(model.net, ids).eval()
    _require_losses(model, shown_first, weights)
    notes = tuple(note for note in (taken, said, IN_SINGLE if half else "") if note)
    return Suspect(spec, model, data, file_sha256(weights), notes=notes)


@torch.no_grad()
def _require_objects(model: Detector, data: DetectionData, weights: Path) -> None:
    """Refuse a net that answers with no objects, or with some that are no numbers."""
    found = model(data.floats())
    if not all(bool(n.isfinite().all()) for one in found for n in (one["boxes"], one["scores"])):
        raise VictimError(
            f"With the weights {weights} the net answers clean pictures with boxes or scores that are "
            "NaN or infinite; get another copy."
        )


@torch.no_grad()
def _require_losses(model: Detector, data: DetectionData, weights: Path) -> None:
    """Refuse a net that has no training losses, or such that are no numbers."""
    losses = model.losses(data.floats(), data.targets)
    if bad := [name for name, value in losses.items() if not bool(value.isfinite())]:
        raise VictimError(
            f"With the weights {weights} the net's loss {shown(bad[0])} on clean pictures is NaN or "
            "infinite; get another copy."
        )


def _label_ids(
    model: Detector, listing: Listing, given: Sequence[int] | None
) -> tuple[tuple[int, ...], str]:
    """What the net calls each class, and a sentence on how that was decided.

    Raises:
        SettingError: a label that the net does not have.
        ModelError: nothing says it.
    """
    outputs = outputs_of(model.net)
    ids: tuple[int, ...]
    if given is not None:
        ids, how = tuple(given), ""
    else:
        how = "in the order of their ids" if listing.ids else "in the order of their names"
        try:
            ids = tuple(label_ids_of(model.net, len(listing.classes)))
        except ModelError:
            own = [one for one in listing.ids if isinstance(one, int)]
            if (
                outputs is None
                or len(own) < len(listing.classes)
                or not 0 <= min(own) <= max(own) < outputs
            ):
                raise
            ids, how = tuple(own), "by the ids of their categories"
    if outputs is not None and max(ids) >= outputs:
        raise SettingError(
            f"The net has the labels 0 to {outputs - 1}, but {max(ids)} shall be one of the classes; "
            "give labels that it has."
        )
    called = _few([f"{one} is {shown(name)}" for name, one in zip(listing.classes, ids, strict=True)])
    return ids, how and f"The net's labels are taken for the classes {how}: {called}."


def _few(words: Sequence[str]) -> str:
    more = len(words) - SHOWN
    return ", ".join([*words[:SHOWN], *([f"and {more} more"] if more > 0 else [])])


def hold_back(clean: DetectionData, share: float) -> tuple[DetectionData, DetectionData]:
    """Clean pictures in two parts: to learn on, and held back to look at the result with.

    Args:
        share: of the pictures with objects that is held back, in [0, 1); rounded down. The SHA-256 of
            the pixels decides, so neither names nor dates do. Pictures without objects are learned on.

    Raises:
        DataError: less than `FEWEST` pictures with objects are left to learn on.
    """
    keys = [hashlib.sha256(image.contiguous().numpy().data).digest() for image in clean.images]
    filled = [row for row, target in enumerate(clean.targets) if len(target["labels"])]
    held = {*sorted(filled, key=keys.__getitem__)[: int(share * len(filled))]}
    if len(filled) - len(held) < FEWEST:
        raise DataError(
            f"Of {len(filled)} pictures with objects {len(held)} are held back, so "
            f"{len(filled) - len(held)} are left to learn on, but {FEWEST} are needed; give more, or "
            "hold back a smaller share."
        )
    return (
        clean.subset([row for row in range(len(clean)) if row not in held]),
        clean.subset(sorted(held)),
    )
