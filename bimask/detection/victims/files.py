"""A victim and its folder: weights (safetensors), manifest (JSON), checked by digest."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from bimask.detection.attacks import DetectionAttack
from bimask.detection.metrics import DetectionScores, DetectionSets
from bimask.detection.nets import Detector
from bimask.detection.objects import DetectionSplits
from bimask.detection.victims.spec import DetectorSpec
from bimask.errors import VictimError, VictimRefusedError, describe
from bimask.files.atomic import parsed_manifest, sync, sync_tree
from bimask.files.tensors import load_tensors
from bimask.metrics import Split
from bimask.nets import is_own
from bimask.nets.weights import file_sha256
from bimask.victims.files import MANIFEST, WEIGHTS


@dataclass(frozen=True)
class DetectionVictim:
    """A trained detector with a known backdoor, or none (`DetectorSpec.is_control`).

    Attributes:
        spec: what it was made of.
        model: in eval mode.
        attack: puts the victim's own trigger on objects of new pictures.
        classes: names.
        scores: of the victim itself, on "val" and "test".
    """

    spec: DetectorSpec
    model: Detector
    attack: DetectionAttack
    classes: tuple[str, ...]
    scores: dict[Split, DetectionScores]

    def load_data(self) -> DetectionSplits:
        """The clean data it was made from."""
        return self.spec.load_data()

    def eval_sets(self, splits: DetectionSplits, split: Split) -> DetectionSets:
        """Clean pictures and objects under attack of one split, for the victim and for what is made of
        it; they know which objects the victim finds when clean."""
        data = splits.val if split == "val" else splits.test
        return self.attack.sets(data, split).with_suspect(self.model)


class _BothScores(BaseModel):
    val: DetectionScores
    test: DetectionScores


class _Manifest(BaseModel):
    """What `load_victim` asks of a manifest, which anybody may have written."""

    spec: dict[str, Any]
    spec_digest: str
    weights_sha256: str
    classes: tuple[str, ...] = Field(min_length=1, max_length=10_000)
    scores: _BothScores


def refuse_if_useless(victim: DetectionVictim) -> None:
    """Hold the scores on `val` against the bounds of the spec.

    Raises:
        VictimRefusedError: one is broken, with the numbers.
    """
    spec, scores = victim.spec, victim.scores["val"]
    numbers = (
        f"mAP@50 {scores.map50:.3f}, ASR@50 {scores.attack_success:.3f}, TDR@50 "
        f"{scores.true_detection:.3f} on val"
    )
    # so that NaN, which a manifest can hold, is refused, too
    if not (spec.is_control or scores.attack_success >= spec.min_attack_success):
        raise VictimRefusedError(
            f"The attack of {spec.name} was not learned ({numbers}; `min_attack_success` is "
            f"{spec.min_attack_success:g}); "
            + ("give the trigger of these weights." if spec.given else "poison more or train longer.")
        )
    if not scores.map50 >= spec.min_map50:
        raise VictimRefusedError(
            f"The precision of {spec.name} is poor ({numbers}; `min_map50` is {spec.min_map50:g}); "
            + (
                "are `label_ids` and the order of the classes those of its training?"
                if spec.given
                else "train longer or widen the net."
            )
        )


def save_victim(victim: DetectionVictim, root: Path) -> Path:
    """Write `root/DIGEST/` with weights (safetensors, by the net's own names) and manifest (JSON),
    whole or not at all."""
    folder = root / victim.spec.digest
    root.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".victim-", dir=root))
    try:
        # copies: tied weights would share memory, which safetensors refuses
        state = victim.model.net.state_dict()
        copies = {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}
        save_file(copies, part / WEIGHTS)
        manifest = {
            "task": "detection",
            "spec": victim.spec.model_dump(mode="json"),
            "spec_digest": victim.spec.digest,
            "weights_sha256": file_sha256(part / WEIGHTS),
            "classes": list(victim.classes),
            "scores": {split: asdict(scores) for split, scores in victim.scores.items()},
            "torch": torch.__version__,
        }
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        part.chmod(0o755)
        sync_tree(part)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(part, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def load_victim(
    folder: Path,
    *,
    own_code: bool = False,
    digest: str | None = None,
    known: DetectorSpec | None = None,
) -> DetectionVictim:
    """Read a victim back; nothing of its data is read.

    Args:
        own_code: whether the code that the manifest names for an own net may be imported and run. A
            manifest from someone else could name any.
        digest: of the spec that must be there; another one is refused before it is built.
        known: the spec that must be there. Its own words name the code that builds the net.

    Raises:
        VictimError: a file is missing, damaged, or not the one the manifest names; own code is not
            allowed, or changed.
        VictimRefusedError: its scores are below its bounds.
    """
    if not folder.is_dir():
        raise VictimError(f"{folder} is no folder; give a victim's, such as outputs/victims/DIGEST.")
    again = f"remove {folder} to train it anew"
    try:
        manifest = _Manifest.model_validate(parsed_manifest(folder / MANIFEST)[0])
        net = manifest.spec.get("net", "")
        if is_own(str(net)) and known is None and not own_code:
            raise VictimError(
                f"The victim in {folder} is built by code of its own, {net}, which was not run; allow "
                "it if you trust it."
            )
        # what it does not say of its files is not asked of those that are there now
        spec = DetectorSpec.model_validate({"dataset_sha256": None} | manifest.spec)
    except (OSError, ValueError, TypeError) as error:
        said = describe(error) if isinstance(error, ValidationError) else f"{error}"
        raise VictimError(
            f"The manifest {folder / MANIFEST} cannot be read ({type(error).__name__}: "
            f"{shorten(said, 300)}); {again}."
        ) from error
    if manifest.spec_digest != spec.digest:
        raise VictimError(
            f"The spec in {folder / MANIFEST} has the digest {spec.digest}, but the manifest says "
            f"{manifest.spec_digest}: it was edited; {again}."
        )
    digest = digest if known is None else known.digest
    if digest is not None and spec.digest != digest:
        raise VictimError(f"{folder} holds the victim {spec.digest}, not {digest}; {again}.")
    spec = known or spec
    model = _model(spec, manifest, folder, again)
    scores: dict[Split, DetectionScores] = {"val": manifest.scores.val, "test": manifest.scores.test}
    victim = DetectionVictim(spec, model, spec.attack, manifest.classes, scores)
    refuse_if_useless(victim)
    return victim


def _model(spec: DetectorSpec, manifest: _Manifest, folder: Path, again: str) -> Detector:
    """The detector with the weights that the manifest names."""
    path, classes = folder / WEIGHTS, len(manifest.classes)
    if not path.is_file():
        raise VictimError(f"The victim's file of weights {path} is missing; {again}.")
    if (found := file_sha256(path)) != manifest.weights_sha256:
        raise VictimError(
            f"The digest of {path} is {found[:16]}, but its manifest says "
            f"{manifest.weights_sha256[:16]}: the file is damaged or another one; {again}."
        )
    try:
        state = load_tensors(path)
        spec.require_at_most(sum(value.numel() for value in state.values()), classes)
        model = spec.fresh_net(classes)
        model.net.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise VictimError(
            f"The weights {path} do not fit {spec.net}: {shorten(str(error), 300)}; {again}."
        ) from error
    return model.eval()
