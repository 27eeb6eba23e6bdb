"""A victim and its folder: weights and trigger (safetensors), manifest (JSON), checked by digest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten

from pydantic import BaseModel, Field
from safetensors import SafetensorError
from torch import nn

from bimask.attacks import Attack, TriggeredData
from bimask.data import Splits
from bimask.errors import SettingError, VictimError, VictimRefusedError
from bimask.files.tensors import load_tensors
from bimask.metrics import EvalSets, Scores, Split
from bimask.victims.folders import (
    TRIGGER,
    WEIGHTS,
    VictimManifest,
    make_again,
    promised,
    read_folder,
    write_folder,
)
from bimask.victims.spec import VictimSpec


@dataclass(frozen=True)
class Victim:
    """A trained model with a known backdoor, or none (`VictimSpec.is_control`).

    Attributes:
        spec: what it was made of.
        model: images in [0, 1] -> logits, in eval mode.
        attack: ready to put the victim's own trigger on new images.
        classes: names.
        scores: of the victim itself, on "val" and "test".
        image_size: height and width of its images; None where nobody wrote it down.
        stored: of an imported victim, the triggered images of each split, in place of a trigger.
    """

    spec: VictimSpec
    model: nn.Module
    attack: Attack
    classes: tuple[str, ...]
    scores: dict[Split, Scores]
    image_size: int | None = None
    stored: dict[Split, TriggeredData] | None = None

    def load_data(self) -> Splits:
        """The clean data it was made from."""
        return self.spec.load_data()

    def eval_sets(self, splits: Splits, split: Split) -> EvalSets:
        """Clean and triggered images of one split, for the victim and for what is made of it."""
        data = splits.val if split == "val" else splits.test
        if self.stored is not None:
            return EvalSets(data, self.stored[split], split)
        return EvalSets.of(self.attack, data, split)


class _BothScores(BaseModel):
    val: Scores
    test: Scores


class _Manifest(VictimManifest):
    """What `load_victim` asks beside it."""

    trigger_sha256: str | None = None
    in_channels: int = Field(ge=1, le=1024)
    image_size: int | None = Field(None, ge=1, le=1024)
    classes: tuple[str, ...] = Field(min_length=1, max_length=100_000)
    scores: _BothScores


def refuse_if_useless(victim: Victim) -> None:
    """Hold the scores on `val` against the bounds of the spec.

    Raises:
        VictimRefusedError: one is broken, with the numbers.
    """
    spec, scores = victim.spec, victim.scores["val"]
    numbers = f"ACC {scores.clean_accuracy:.3f}, ASR {scores.attack_success:.3f} on val"
    given = spec.weights is not None
    # so that NaN, which a manifest can hold, is refused, too
    if not (spec.is_control or scores.attack_success >= spec.min_attack_success):
        raise VictimRefusedError(
            f"The attack of {spec.name} was not learned ({numbers}; `min_attack_success` is "
            f"{spec.min_attack_success:g}); "
            + (
                "give the trigger of these weights."
                if given
                else "lower the bound if it shall be used all the same."
                if spec.imported is not None
                else "poison more or train longer."
            )
        )
    if not scores.clean_accuracy >= spec.min_clean_accuracy:
        raise VictimRefusedError(
            f"The clean accuracy of {spec.name} is poor ({numbers}; `min_clean_accuracy` is "
            f"{spec.min_clean_accuracy:g}); "
            + (
                "are `normalise` and the order of the classes those of its training?"
                if given
                else "train longer or widen the net."
            )
        )


def save_victim(victim: Victim, root: Path) -> Path:
    """Write `root/DIGEST/` with weights and trigger state (safetensors) and manifest (JSON), whole or
    not at all. An attack without state has no file for it."""
    folder = root / victim.spec.digest
    manifest = {
        "spec": victim.spec.model_dump(),
        "spec_digest": victim.spec.digest,
        "in_channels": victim.model.get_buffer("mean").shape[1],
        "image_size": victim.image_size,
        "classes": list(victim.classes),
        "scores": {split: asdict(scores) for split, scores in victim.scores.items()},
    }
    states = {WEIGHTS: victim.model.state_dict()}
    if victim.attack.has_state:
        states[TRIGGER] = victim.attack.state()
    write_folder(folder, states, manifest)
    return folder


def load_victim(
    folder: Path, *, own_code: bool = False, digest: str | None = None, known: VictimSpec | None = None
) -> Victim:
    """Read a victim back.

    Args:
        own_code: whether the code that the manifest names for an own net may be imported and run. A
            manifest from someone else could name any.
        digest: of the spec that must be there; another one is refused before it is built.
        known: the spec that must be there. Its own words name the code that builds the net, not the
            manifest's, which may name another place of the same digest.

    Raises:
        VictimError: a file is missing, damaged, or not the one the manifest names; own code is not
            allowed, or changed.
        VictimRefusedError: its scores are below its bounds.
    """
    manifest, spec = read_folder(
        folder, _Manifest, _spec, own_code=own_code, digest=digest, known=known
    )
    again, attack = make_again(folder), spec.build_attack()
    weights = promised(folder / WEIGHTS, manifest.weights_sha256, "victim's file of weights")
    image_size = manifest.image_size
    if "image_size" not in manifest.model_fields_set:  # before it was written down
        image_size = spec.image_size
    shape = (manifest.in_channels, len(manifest.classes), image_size)
    try:
        state = load_tensors(weights)
        spec.require_at_most(sum(value.numel() for value in state.values()), *shape)
        ones = [1.0] * manifest.in_channels
        net = spec.net_of(ones, ones, *shape)
        net.load_state_dict(state)
        spec.with_door(net.eval(), image_size)
    except (SafetensorError, RuntimeError) as error:
        raise VictimError(
            f"The weights {weights} do not fit {spec.net}: {shorten(str(error), 300)}; {again}."
        ) from error
    if attack.has_state:
        named = manifest.trigger_sha256 or ""
        trigger = promised(folder / TRIGGER, named, "file of the trigger's state")
        try:
            attack.load_state(load_tensors(trigger))
        except (SafetensorError, SettingError) as error:
            raise VictimError(
                f"The trigger's state {trigger} is of no use: {error} {again}."
            ) from error
    scores: dict[Split, Scores] = {"val": manifest.scores.val, "test": manifest.scores.test}
    victim = Victim(spec, net.eval(), attack, manifest.classes, scores, image_size=image_size)
    refuse_if_useless(victim)
    return victim


def _spec(manifest: _Manifest) -> VictimSpec:
    """ValueError for one that cannot be, or that its files cannot belong to."""
    # what it does not say of its pictures is not asked of those that are there now
    spec = VictimSpec.model_validate({"dataset_sha256": None} | manifest.spec)
    if spec.build_attack().has_state and manifest.trigger_sha256 is None:
        raise ValueError("no trigger_sha256")
    return spec
