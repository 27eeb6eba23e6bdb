"""The folder of an imported victim: weights and images as safetensors, and a manifest of both."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bimask.attacks import TriggeredData
from bimask.data import ImageData
from bimask.errors import DataError, InteropError, describe
from bimask.files.atomic import atomic_directory, parsed_manifest
from bimask.files.png import check_extent
from bimask.files.tensors import load_tensors
from bimask.metrics import EvalSets, Scores
from bimask.nets.fitting import fit_net
from bimask.victims.imported import ImportedVictim

WEIGHTS, IMAGES, MANIFEST = "weights.safetensors", "images.safetensors", "manifest.json"


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["bimask imported victim 1"] = "bimask imported victim 1"
    source: str
    source_file: str
    source_sha256: str
    net: str
    width: int | None
    mean: list[float]
    std: list[float]
    dataset: str
    classes: list[str]
    scores: dict[str, Any]
    before: dict[str, Any] | None
    changed_pixel_rate: float | None
    changed_visibly: float | None
    notes: list[str]
    weights_sha256: str
    images_sha256: str
    torch: str


def save_imported(victim: ImportedVictim, out: Path, *, source: Path) -> None:
    """Write `out/` with weights, images (uint8) and manifest, whole or not at all.

    Args:
        source: the file that was imported; its name and digest go into the manifest.

    Raises:
        SettingError: `out` exists or cannot be written.
    """
    with atomic_directory(out) as part:
        state = victim.model.net.state_dict()
        save_file({name: value.contiguous() for name, value in state.items()}, part / WEIGHTS)
        clean, triggered = victim.sets.clean, victim.sets.triggered
        images = {
            "clean_images": clean.images,
            "clean_labels": clean.labels,
            "triggered_images": triggered.images,
            "attack_labels": triggered.attack_labels,
            "true_labels": triggered.true_labels,
            "clean_index": victim.clean_index,
            "counterparts": victim.counterparts,
        }
        known = {name: value.contiguous() for name, value in images.items() if value is not None}
        save_file(known, part / IMAGES)
        manifest = _Manifest(
            source=victim.source,
            source_file=source.name,
            source_sha256=sha256(source),
            net=victim.net,
            width=victim.width,
            mean=victim.model.mean.flatten().tolist(),
            std=victim.model.std.flatten().tolist(),
            dataset=victim.dataset,
            classes=list(victim.classes),
            scores=asdict(victim.scores),
            before=None if victim.before is None else asdict(victim.before),
            changed_pixel_rate=victim.changed_pixel_rate,
            changed_visibly=victim.changed_visibly,
            notes=list(victim.notes),
            weights_sha256=sha256(part / WEIGHTS),
            images_sha256=sha256(part / IMAGES),
            torch=torch.__version__,
        )
        (part / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")


def is_imported(folder: Path) -> bool:
    """Whether a folder is one that `save_imported` wrote, by its files' names."""
    return (folder / IMAGES).exists()


def load_imported(folder: Path) -> ImportedVictim:
    """Read what `save_imported` wrote.

    Raises:
        InteropError: a file is missing, damaged, or not the one the manifest names.
    """
    again = "import it anew"
    try:
        manifest = _Manifest.model_validate(parsed_manifest(folder / MANIFEST)[0])
        if missing := [n for n in (WEIGHTS, IMAGES) if not (folder / n).is_file()]:
            raise OSError(f"it has no file {missing[0]}")
        found = {name: sha256(folder / name) for name in (WEIGHTS, IMAGES)}
        scores = Scores(**manifest.scores)
        before = None if manifest.before is None else Scores(**manifest.before)
    except (OSError, ValueError, TypeError, ValidationError) as error:
        first = describe(error) if isinstance(error, ValidationError) else str(error)
        raise InteropError(
            f"{folder} is not an imported victim ({type(error).__name__}: {shorten(first, 300)}); "
            f"{again}."
        ) from error
    promised = {WEIGHTS: manifest.weights_sha256, IMAGES: manifest.images_sha256}
    for name, digest in promised.items():
        if found[name] != digest:
            raise InteropError(
                f"The digest of {folder / name} is {found[name][:16]}, but the manifest says "
                f"{digest[:16]}: the file is damaged or another one; {again}."
            )
    try:
        state, images = load_tensors(folder / WEIGHTS), load_tensors(folder / IMAGES)
        clean = ImageData(images["clean_images"], images["clean_labels"], tuple(manifest.classes))
        triggered = TriggeredData(
            images["triggered_images"], images["attack_labels"], images["true_labels"]
        )
        index, counterparts = images.get("clean_index"), images.get("counterparts")
        _check_images(clean, triggered, index, clean.images if counterparts is None else counterparts)
    except (SafetensorError, KeyError, DataError, ValueError) as error:
        raise InteropError(f"The files of {folder} cannot be read: {error}; {again}.") from error
    model, width = fit_net(
        manifest.net,
        state,
        num_classes=len(manifest.classes),
        mean=manifest.mean,
        std=manifest.std,
        what=str(folder / WEIGHTS),
    )
    sets = EvalSets(clean, triggered, "test")
    return ImportedVictim(
        manifest.source,
        manifest.net,
        width,
        model,
        manifest.dataset,
        sets,
        index,
        scores,
        before,
        tuple(manifest.notes),
        counterparts,
    )


def _check_images(
    clean: ImageData, triggered: TriggeredData, index: Tensor | None, counterparts: Tensor
) -> None:
    """Refuse (ValueError) images, labels and positions that do not belong together."""
    count, shape, classes = len(triggered.images), clean.images.shape[1:], clean.num_classes
    check_extent(len(clean), *shape)
    for images in (triggered.images, counterparts):
        if images.dtype != torch.uint8 or images.shape[1:] != shape:
            raise ValueError(
                f"images of {images.dtype} {tuple(images.shape)} beside clean ones of {tuple(shape)}"
            )
    below = {"labels": classes, "positions": len(counterparts)}
    for what, numbers, length in (
        ("labels", clean.labels, len(clean)),
        ("labels", triggered.attack_labels, count),
        ("labels", triggered.true_labels, count),
        ("positions", index, count),
    ):
        if numbers is None:
            continue
        if numbers.dtype != torch.int64 or numbers.shape != (length,):
            raise ValueError(f"{length} {what} as {numbers.dtype} {tuple(numbers.shape)}")
        if not ((numbers >= 0) & (numbers < below[what])).all():
            raise ValueError(f"{what} that are not all of 0 to {below[what] - 1}")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
