"""The folder of a cleaned model: what is in it, and how it is read back.

model.safetensors      weights under the names of the suspect's own file, masks folded in
masks.safetensors      mask and selection of every site; of a defence without masks tensors.safetensors
inverse.safetensors    the inverse twin, if asked for: the backdoor without the clean task
net.py                 the file of an own factory, if the net is made by one
report.html            pictures, masks, before and after
manifest.json          what was made of what, how, and the files' digests
"""

from __future__ import annotations

import copy
import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from bimask.cleaned.before_after import BeforeAfter
from bimask.cleaned.export import FOLDED, require_equal
from bimask.cleaned.report import render
from bimask.defences.base import DefenceResult
from bimask.defences.purify import defence_of
from bimask.errors import SettingError, VictimError
from bimask.files.atomic import atomic_directory
from bimask.files.tensors import load_tensors
from bimask.inspection.held_back import HeldBack
from bimask.inspection.suspect import Suspect
from bimask.masking.coverage import coverage
from bimask.masking.inserted import insert, inserted_in
from bimask.masking.masks import MaskSet, fold, masked_forward
from bimask.masking.sites import add_gates, gates_in
from bimask.metrics import Scores
from bimask.nets import Normalised, is_own, source_of
from bimask.nets.answers import logits_of
from bimask.nets.cleaned import (
    MANIFEST,
    MODEL,
    NET,
    PACKAGES,
    REPORT,
    CleanedManifest,
    read_cleaned,
)
from bimask.nets.door import Door
from bimask.nets.spec import NetSpec
from bimask.nets.weights import file_sha256

INVERSE = "inverse.safetensors"
Sides = Annotated[int, Field(ge=1, le=1024)]  # of an image, and its channels


class _Manifest(CleanedManifest):
    image: tuple[Sides, Sides, Sides]
    gates: list[str]
    inserted: dict[str, str] = Field(default_factory=dict)
    mean: list[float]
    std: list[float]
    wrapped: bool
    door: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Cleaned:
    """A cleaned model, read back.

    Attributes:
        model: (N, C, H, W) float in [0, 1] -> (N, K) logits, in eval mode.
        classes: K names.
        shape: (C, H, W) of an image.
        manifest: as it was written.
    """

    model: nn.Module
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    manifest: dict[str, Any]


def save_cleaned(
    out: Path,
    suspect: Suspect,
    result: DefenceResult,
    looked: BeforeAfter,
    *,
    seed: int,
    inverse: bool = False,
    scores: Mapping[str, Scores] | None = None,
    held_back: HeldBack | None = None,
) -> dict[str, Any]:
    """Write a cleaned model, whole or not at all, and say what was written: the manifest.

    What is written is read back and compared with the masked suspect on the clean images.

    Args:
        out: a new folder.
        suspect: with its model on the CPU.
        result: of any defence on it.
        seed: of the run.
        inverse: write the inverse twin, too; of a defence that has one.
        scores: "before" and "after" on `test`, where the trigger is known.
        held_back: what pictures say that the run did not learn on.

    Raises:
        SettingError: `out` exists or cannot be made.
        ExportError: what would be written answers otherwise than what the defence ended with;
            nothing is written.
    """
    defence, images = defence_of(result.config), suspect.clean.floats()
    tensors = {name: t.detach().cpu().contiguous() for name, t in result.tensors.items()}
    masks = defence.masks(tensors, result.config)
    twin = defence.twin(suspect.model, tensors, result.config) if inverse else None
    if inverse and twin is None:
        raise SettingError(f"The defence {defence.name} has no inverse twin; leave --inverse out.")
    if masks is None:
        purified = defence.restore(suspect.model, tensors, result.config)
        expected = logits_of(copy.deepcopy(result.model()).cpu(), images)
    else:
        purified = fold(suspect.model, masks)
        with torch.no_grad():
            expected = torch.cat([masked_forward(suspect.model, masks, x) for x in images.split(256)])
    with atomic_directory(out) as part:
        _save(_inner(purified, suspect.wrapped), part / MODEL)
        save_file(tensors, part / f"{defence.stem}.safetensors")
        if twin is not None:
            _save(_inner(twin, suspect.wrapped), part / INVERSE)
        _inner(purified, suspect.wrapped).load_state_dict(load_tensors(part / MODEL))
        error = require_equal(logits_of(purified, images), expected, FOLDED, "The folded model")
        if (source := _own_file(suspect.spec.net)) is not None:
            shutil.copyfile(source, part / NET)
        manifest = _manifest(suspect, purified, result, masks, looked, seed)
        manifest["parity"] = {"largest_difference": error, "allowed": FOLDED, "images": len(images)}
        manifest |= {name: asdict(value) for name, value in (scores or {}).items()}
        if held_back is not None:
            manifest["held_back"] = asdict(held_back)
        (part / REPORT).write_text(render(suspect, purified, masks, looked, manifest))
        files = sorted(path for path in part.iterdir())
        manifest["files"] = {path.name: file_sha256(path) for path in files}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _manifest(
    suspect: Suspect,
    purified: nn.Module,
    result: DefenceResult,
    masks: MaskSet | None,
    looked: BeforeAfter,
    seed: int,
) -> dict[str, Any]:
    few = suspect.clean.floats()[:4]
    reached = None if masks is None else asdict(coverage(suspect.model, masks, few))
    looks = {"before": looked.before, "after": looked.after, "twin": looked.twin}
    inner = _inner(purified, suspect.wrapped)
    return {
        "suspect": {
            "weights_sha256": suspect.weights_sha256,
            "victim": suspect.victim,
            "spec": suspect.spec.model_dump(mode="json"),
        },
        "net": suspect.spec.model_dump(mode="json", include={"net", "width", "net_sha256"}),
        "mean": suspect.model.mean.flatten().tolist(),
        "std": suspect.model.std.flatten().tolist(),
        "classes": list(suspect.classes),
        "image": list(suspect.clean.images.shape[1:]),
        "wrapped": suspect.wrapped,
        "gates": gates_in(inner),
        "inserted": inserted_in(inner),
        "door": suspect.door.as_json(),
        "coverage": reached,
        "defence": defence_of(result.config).name,
        "purify": result.config.model_dump(mode="json"),
        "seed": seed,
        "clean_images": len(suspect.clean.images),
        "on_clean_images": {name: asdict(one) for name, one in looks.items() if one is not None},
        "rounds": len(result.history),
        "passes": asdict(result.passes),
        "seconds": result.seconds,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def load_cleaned(folder: Path, *, own_code: bool = False) -> Cleaned:
    """Read a cleaned model back.

    Args:
        own_code: whether the code of an own net, in the folder's net.py or where the manifest says, may
            be imported and run.

    Raises:
        VictimError: a file is missing, changed, or not what the manifest says; own code is not allowed.
    """

    def refuse(content: Any) -> None:
        if isinstance(content, dict) and content.get("task") == "detection":
            raise VictimError(
                f"{folder} holds a cleaned detector, which `bimask.detection.load_cleaned` reads; "
                "exports know classifiers alone."
            )

    manifest, spec, content = read_cleaned(
        folder, _Manifest, NetSpec, what="model", own_code=own_code, refuse=refuse
    )
    channels, height, width = manifest.image
    size = height if height == width else (height, width)
    shape = (channels, len(manifest.classes), size)
    try:
        state = load_tensors(folder / MODEL)
        spec.require_at_most(sum(value.numel() for value in state.values()), *shape)
        model = spec.net_of(manifest.mean, manifest.std, *shape)
        inner = _inner(model, manifest.wrapped)
        add_gates(inner, manifest.gates)
        insert(inner, manifest.inserted, state)
        inner.load_state_dict(state)
        Door.from_json(manifest.door).install(model)
    except (
        OSError,
        SafetensorError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
    ) as error:
        raise VictimError(
            f"The weights in {folder} do not fit {spec.net}: {shorten(str(error), 300)}."
        ) from error
    return Cleaned(model.eval(), manifest.classes, manifest.image, content)


def _inner(model: nn.Module, wrapped: bool) -> nn.Module:
    """The module that the suspect's own file names the tensors of."""
    assert isinstance(model, Normalised)
    return model if wrapped else model.net


def _own_file(net: str) -> Path | None:
    return source_of(net) if is_own(net) and net.rpartition(":")[0].endswith(".py") else None


def _save(model: nn.Module, path: Path) -> None:
    # copies: tied weights would share memory, which safetensors refuses
    copies: dict[str, Tensor] = {
        name: value.cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    save_file(copies, path)
