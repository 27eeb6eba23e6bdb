"""Victims of other frameworks: a trigger that is known by its images alone, shared out to splits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bimask.attacks import Attack, TriggeredData
from bimask.data import Splits
from bimask.errors import SettingError, VictimError
from bimask.files.atomic import parsed_manifest
from bimask.metrics import Split
from bimask.nets import is_own
from bimask.victims.imported import ImportedVictim
from bimask.victims.imported_files import MANIFEST

# Of five parts, by the digest of an image: the defender's, those to choose on, those to report on.
PARTS: dict[str, tuple[int, ...]] = {"train": (0,), "val": (1, 2), "test": (3, 4)}


class StoredTrigger(Attack):
    """The attack of an imported victim: nobody wrote down how to put it on new images."""

    has_state = True

    def trigger(self, images: Tensor) -> Tensor:
        raise SettingError(
            "The trigger of an imported victim is known by its stored images alone, so it cannot be "
            "put on others."
        )


def shared_out(victim: ImportedVictim) -> tuple[Splits, dict[Split, TriggeredData]]:
    """The one stored split as three: clean images, and the triggered ones of `val` and `test`.

    An image's part is decided by the SHA-256 of its pixels, a triggered image's by those of its clean
    original: both are in the same part, whatever else is in the file and in which order. A fifth is
    the defender's (`train`; its triggered images are left out), two fifths each are `val` and `test`.
    Where nothing says which the originals are, triggered images are shared out by their own pixels.
    """
    clean, triggered = victim.sets.clean, victim.sets.triggered
    parts = _parts(clean.images)
    splits = {name: clean.subset(torch.isin(parts, torch.tensor(PARTS[name]))) for name in PARTS}
    originals = triggered.images
    if victim.clean_index is not None:
        source = clean.images if victim.counterparts is None else victim.counterparts
        originals = source[victim.clean_index]
    parts = _parts(originals)
    stored: dict[Split, TriggeredData] = {}
    names: tuple[Split, Split] = ("val", "test")
    for name in names:
        rows = torch.isin(parts, torch.tensor(PARTS[name])).nonzero().flatten()
        if victim.clean_index is not None:  # in the order of the clean ones, to be looked at in pairs
            rows = rows[victim.clean_index[rows].argsort(stable=True)]
        stored[name] = TriggeredData(
            triggered.images[rows], triggered.attack_labels[rows], triggered.true_labels[rows]
        )
    return Splits(splits["train"], splits["val"], splits["test"]), stored


def stamped(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a spec with what the folder `imported` says: the digest of its manifest, its net.

    Raises:
        VictimError: the manifest cannot be read.
    """
    path = Path(given["imported"]) / MANIFEST
    try:
        about, content = parsed_manifest(path)
        net, width = about["net"], about["width"]
        if is_own(net):  # which would be looked for, and the packages above it run
            raise ValueError(f"a net of its own, {net!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VictimError(
            f"{path.parent} holds no imported victim ({type(error).__name__}: {error}); give a folder "
            "that `python -m bimask import` wrote."
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    return dict(given) | {"imported_sha256": digest, "net": net, "width": width}


def _parts(images: Tensor) -> Tensor:
    """(N, C, H, W) uint8 -> (N,) int64 in [0, 5), by content."""
    digests = (hashlib.sha256(image.contiguous().numpy().data).digest()[:8] for image in images)
    return torch.tensor([int.from_bytes(digest, "big") % 5 for digest in digests])
