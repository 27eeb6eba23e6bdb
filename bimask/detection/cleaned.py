"""The folder of a cleaned detector:

model.safetensors   the repaired weights under the suspect's own names; its own class loads them by
                    `load_state_dict(..., strict=True)`
net.py              the file of an own factory, if the net is made by one
report.html         pictures with boxes, before and after
manifest.json       what was made of what, how, and the files' digests

The folder of a cleaned classifier (`bimask.cleaned.folder`) has the same names.
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
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from bimask.defences.base import DefenceResult
from bimask.detection.before_after import Look
from bimask.detection.metrics import DetectionScores
from bimask.detection.nets.detector import Detector
from bimask.detection.nets.spec import DetectorNetSpec
from bimask.detection.page import Shown, render
from bimask.detection.suspects import Suspect
from bimask.errors import BimaskError, ExportError, VictimError
from bimask.files.atomic import atomic_directory
from bimask.files.stand_ins import MAX_SIDE
from bimask.files.tensors import load_tensors
from bimask.nets.cleaned import (
    MANIFEST,
    MODEL,
    NET,
    PACKAGES,
    REPORT,
    CleanedManifest,
    read_cleaned,
)
from bimask.nets.named import is_own, source_of
from bimask.nets.weights import file_sha256

NET_KEYS = {"net", "width", "image_size", "label_ids", "outputs", "net_sha256"}


class _Manifest(CleanedManifest):
    task: Literal["detection"]
    longest_side: Annotated[int, Field(ge=1, le=MAX_SIDE)]


@dataclass(frozen=True)
class Cleaned:
    """A cleaned detector, read back.

    Attributes:
        model: list of (3, H, W) float in [0, 1] -> boxes, labels and scores of each, in eval mode.
        classes: names; labels are their places.
        longest_side: pixels, of any picture that it was repaired, looked at or measured with.
        manifest: as it was written.
    """

    model: Detector
    classes: tuple[str, ...]
    longest_side: int
    manifest: dict[str, Any]


def save_cleaned(
    out: Path,
    suspect: Suspect,
    defence: str,
    result: DefenceResult,
    looks: Mapping[str, Look],
    shown: Shown,
    *,
    longest_side: int,
    seed: int,
    risk: Mapping[str, Any] | None = None,
    reason: str = "",
    scores: Mapping[str, DetectionScores] | None = None,
) -> dict[str, Any]:
    """Write a cleaned detector, whole or not at all, and say what was written: the manifest.

    What is written is read back into the net that the suspect's factory makes, and compared.

    Args:
        out: a new folder.
        suspect: with its model on the CPU.
        defence: its name.
        result: of it.
        looks: "learned" and perhaps "held_back".
        shown: pictures for the page.
        longest_side: pixels, of any picture that it was repaired, looked at or measured with.
        seed: of the run.
        risk: what `bimask.detection.before_after.risk_of` says.
        reason: why there is none; else empty.
        scores: "before" and "after" on `test`, where the trigger is known.

    Raises:
        SettingError: `out` exists or cannot be made.
        ExportError: what would be written is not the suspect's own kind of net; nothing is written.
    """
    repaired = copy.deepcopy(result.model()).cpu()
    assert isinstance(repaired, Detector)
    with atomic_directory(out) as part:
        _save(repaired.net, part / MODEL)
        _require_loading(suspect.spec, repaired, part / MODEL)
        if is_own(suspect.spec.net) and suspect.spec.net.rpartition(":")[0].endswith(".py"):
            shutil.copyfile(source_of(suspect.spec.net), part / NET)
        manifest = {
            "task": "detection",
            "suspect": {"weights_sha256": suspect.weights_sha256, "victim": suspect.victim},
            "net": suspect.spec.model_dump(mode="json", include=NET_KEYS),
            "classes": list(suspect.clean.classes),
            "longest_side": longest_side,
            "defence": defence,
            "purify": result.config.model_dump(mode="json"),
            "seed": seed,
            "clean_pictures": {"count": len(suspect.clean), "digest": suspect.clean.digest},
            "on_clean_pictures": {name: one.as_json() for name, one in looks.items()},
            "risk": risk and dict(risk),
            "no_risk": reason,
            "numbers": dict(result.numbers),
            "steps": len(result.history),
            "passes": asdict(result.passes),
            "seconds": result.seconds,
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in PACKAGES},
        }
        manifest |= {name: asdict(value) for name, value in (scores or {}).items()}
        (part / REPORT).write_text(render(manifest, shown, result.history))
        files = sorted(path for path in part.iterdir())
        manifest["files"] = {path.name: file_sha256(path) for path in files}
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def load_cleaned(folder: Path, *, own_code: bool = False) -> Cleaned:
    """Read a cleaned detector back.

    Args:
        own_code: whether the code of an own net, in the folder's net.py or where the manifest says, may
            be imported and run.

    Raises:
        VictimError: a file is missing, changed, or not what the manifest says; own code is not allowed.
    """
    manifest, spec, content = read_cleaned(
        folder, _Manifest, DetectorNetSpec, what="detector", own_code=own_code
    )
    try:
        state = load_tensors(folder / MODEL)
        spec.require_at_most(sum(value.numel() for value in state.values()), len(manifest.classes))
        model = spec.fresh_net(len(manifest.classes))
        model.net.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise VictimError(
            f"The weights in {folder} do not fit {spec.net}: {shorten(str(error), 300)}."
        ) from error
    return Cleaned(model.eval(), manifest.classes, manifest.longest_side, content)


def _require_loading(spec: DetectorNetSpec, repaired: Detector, path: Path) -> None:
    """Refuse a file that the suspect's own net would not take whole, or take for another."""
    again = spec.fresh_net(len(repaired.label_ids))
    try:
        again.net.load_state_dict(load_tensors(path), strict=True)
    except (BimaskError, RuntimeError) as error:
        raise ExportError(
            f"The repaired detector is no {spec.net} any more, so nothing was written: "
            f"{shorten(str(error), 300)}."
        ) from error
    state = repaired.net.state_dict()
    for name, value in again.net.state_dict().items():
        if not torch.equal(value, state[name].to(value.dtype)):
            raise ExportError(f"{name} was written otherwise than it is, so nothing was written.")


def _save(net: nn.Module, path: Path) -> None:
    # copies: tied weights would share memory, which safetensors refuses
    copies: dict[str, Tensor] = {
        name: value.cpu().clone(memory_format=torch.contiguous_format)
        for name, value in net.state_dict().items()
    }
    save_file(copies, path)
