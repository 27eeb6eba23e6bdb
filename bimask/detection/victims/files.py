"""A victim and its folder: weights (safetensors), manifest (JSON), checked by digest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten

from pydantic import BaseModel, Field
from safetensors import SafetensorError

from bimask.detection.attacks import DetectionAttack
from bimask.detection.metrics import DetectionScores, DetectionSets
from bimask.detection.nets import Detector
from bimask.detection.objects import DetectionSplits
from bimask.detection.victims.spec import DetectorSpec
from bimask.errors import VictimError, VictimRefusedError
from bimask.files.tensors import load_tensors
from bimask.metrics import Split
from bimask.victims.folders import (
    WEIGHTS,
    VictimManifest,
    make_again,
    promised,
    read_folder,
    write_folder,
)


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


class _Manifest(VictimManifest):
    """What `load_victim` asks beside it."""

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
    manifest = {
        "task": "detection",
        "spec": victim.spec.model_dump(mode="json"),
        "spec_digest": victim.spec.digest,
        "classes": list(victim.classes),
        "scores": {split: asdict(scores) for split, scores in victim.scores.items()},
    }
    write_folder(folder, {WEIGHTS: victim.model.net.state_dict()}, manifest)
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
    manifest, spec = read_folder(
        folder, _Manifest, _spec, own_code=own_code, digest=digest, known=known
    )
    weights = promised(folder / WEIGHTS, manifest.weights_sha256, "victim's file of weights")
    try:
        state = load_tensors(weights)
        numbers = sum(value.numel() for value in state.values())
        spec.require_at_most(numbers, len(manifest.classes))
        model = spec.fresh_net(len(manifest.classes))
        model.net.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise VictimError(
            f"The weights {weights} do not fit {spec.net}: {shorten(str(error), 300)}; "
            f"{make_again(folder)}."
        ) from error
    scores: dict[Split, DetectionScores] = {"val": manifest.scores.val, "test": manifest.scores.test}
    victim = DetectionVictim(spec, model.eval(), spec.attack, manifest.classes, scores)
    refuse_if_useless(victim)
    return victim


def _spec(manifest: _Manifest) -> DetectorSpec:
    """ValueError for one that cannot be."""
    # what it does not say of its files is not asked of those that are there now
    return DetectorSpec.model_validate({"dataset_sha256": None} | manifest.spec)
