"""Victims: models trained on poisoned data, saved with their scores, loaded by digest."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bimask.attacks import Attack, build_attack
from bimask.data import LOADERS, Splits, load_data
from bimask.errors import SettingError, VictimError, VictimRefusedError
from bimask.metrics import EvalSets, Scores, Split, evaluate
from bimask.net_spec import NetSpec
from bimask.nets import is_own
from bimask.suspect import file_sha256, load_weights
from bimask.training import fit

WEIGHTS, TRIGGER, MANIFEST = "victim.safetensors", "trigger.safetensors", "manifest.json"


class VictimSpec(NetSpec):
    """All that a victim is made of. Two specs that differ in nothing but bounds share a digest.

    The recipe is that of `bimask.training.fit` on the training split; the last epoch is kept, nothing
    is chosen on `val` or `test`.

    With `weights` nothing is trained: the net is loaded from them and its scores under the attack's
    trigger are measured. Settings of the training then decide nothing.

    With a `poisoning_rate` of 0 it is a clean control, trained on clean images alone. The attack is
    then the trigger whose rate of success is reported; none is asked for.
    """

    dataset: str = "digits"
    image_size: int | None = Field(None, ge=4, le=1024)
    attack: dict[str, Any] = Field(default_factory=lambda: {"name": "badnets"})
    poisoning_rate: float = Field(0.1, ge=0, le=1, description="0 makes a clean control")
    poisoning_rate_of: Literal["dataset", "target_class"] = "dataset"
    epochs: int = Field(30, ge=1)
    batch_size: int = Field(128, ge=2)
    lr: float = Field(0.1, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    shift: int = Field(1, ge=0, description="augmentation: random shift by up to this many pixels")
    flip: bool = Field(False, description="augmentation: random horizontal flip")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of training's passes")
    seed: int = Field(0, ge=0)
    min_clean_accuracy: float = Field(0.5, ge=0, le=1, description="bound on val")
    min_attack_success: float = Field(0.5, ge=0, le=1, description="bound on val")

    @model_validator(mode="after")
    def _known_names(self) -> VictimSpec:
        if self.dataset not in LOADERS and not self.dataset.startswith("imagefolder:"):
            known = ", ".join(sorted(LOADERS))
            raise ValueError(
                f"unknown dataset {self.dataset!r}, known are {known} and imagefolder:PATH"
            )
        if "name" not in self.attack:
            raise ValueError("`attack` needs a `name`")
        build_attack(**self.attack)  # SettingError is a ValueError: pydantic reports it
        return self

    @property
    def digest(self) -> str:
        """Sixteen hex digits of everything that decides the weights; files count by their content."""
        bounds_and_paths = {"min_clean_accuracy", "min_attack_success", "weights"}
        deciding = self.model_dump(exclude=bounds_and_paths)
        if self.net_sha256 is not None:
            deciding["net"] = self.net.rpartition(":")[2]
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def is_control(self) -> bool:
        """Whether it has no backdoor."""
        return self.poisoning_rate == 0

    @property
    def name(self) -> str:
        """For people: dataset and attack, or "clean"."""
        dataset = Path(self.dataset.removeprefix("imagefolder:")).name
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", dataset).strip("-") or "images"
        return f"{readable}-{'clean' if self.is_control else self.attack['name']}"

    def build_attack(self) -> Attack:
        """The attack with its hyper-parameters; a victim's own is ready for images as well."""
        return build_attack(**self.attack)

    def recipe(self) -> dict[str, Any]:
        """What `bimask.training.fit` is told of net and training."""
        keys = {"epochs", "batch_size", "lr", "weight_decay", "shift", "flip", "precision", "seed"}
        return {"fresh_net": self.fresh_net} | self.model_dump(include=keys)

    def rates(self) -> dict[str, Any]:
        """What the attack is told of how many samples to poison."""
        return {"rate": self.poisoning_rate, "rate_of": self.poisoning_rate_of}

    def load_data(self) -> Splits:
        """The clean data the victim was made from."""
        return load_data(self.dataset, image_size=self.image_size)


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
    """

    spec: VictimSpec
    model: nn.Module
    attack: Attack
    classes: tuple[str, ...]
    scores: dict[Split, Scores]
    image_size: int | None = None

    def eval_sets(self, splits: Splits, split: Split) -> EvalSets:
        """Clean and triggered images of one split, for the victim and for what is made of it."""
        data = splits.val if split == "val" else splits.test
        return EvalSets.of(self.attack, data, split)


@dataclass(frozen=True)
class EpochLog:
    """Progress of training: the epoch just done (from 1), its mean loss, and now and then scores."""

    epoch: int
    epochs: int
    loss: float
    scores: Scores | None


def train_victim(
    spec: VictimSpec,
    *,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[EpochLog], None] | None = None,
) -> Victim:
    """Train a backdoored model; the same spec gives the same weights on the same hardware.

    With `weights` in the spec the model is loaded, not trained.

    Raises:
        VictimRefusedError: attack not learned or accuracy poor, with the numbers.
        VictimError: weights that cannot be read or do not fit.
        NonFiniteError: the training diverged.
        DataError, SettingError: from the data, the attack or the net.
    """
    if spec.weights is not None:
        return _adopt(spec, Path(spec.weights), device)
    splits, attack = spec.load_data(), spec.build_attack()
    train, rates = splits.train.to(device), spec.rates()
    # a rate that cannot be is refused before any training
    share = 0.0 if spec.is_control else attack.share(train, **rates)
    recipe = spec.recipe()
    attack.prepare(train, seed=spec.seed, fit_net=lambda clean: fit(clean, **recipe))

    def sets(split: Split) -> EvalSets:  # anew: the attack may learn while the victim does
        return EvalSets.of(attack, splits.val if split == "val" else splits.test, split)

    sets("val")  # a null trigger is refused before the training, too

    def report(epoch: int, loss: float, net: nn.Module) -> None:
        if on_epoch is not None:
            due = epoch % max(1, spec.epochs // 10) == 0
            scores = evaluate(net, sets("val").to(device)) if due else None
            on_epoch(EpochLog(epoch, spec.epochs, loss, scores))

    if spec.is_control:
        net = fit(train, on_epoch=report, **recipe)
    elif attack.batchwise:
        net = fit(train, attack=attack, share=share, on_epoch=report, **recipe)
    else:
        poisoned = attack.poison(train, seed=spec.seed, **rates).data
        net = fit(poisoned, on_epoch=report, **recipe)
    scores: dict[Split, Scores] = {
        split: evaluate(net, sets(split).to(device)) for split in ("val", "test")
    }
    size = splits.train.images.shape[-1]
    victim = Victim(spec, net.cpu(), attack, splits.train.classes, scores, image_size=size)
    _refuse_if_useless(victim)
    return victim


def _adopt(spec: VictimSpec, weights: Path, device: torch.device | str) -> Victim:
    """A model that was trained elsewhere, with its scores under the spec's trigger."""
    splits, attack = spec.load_data(), spec.build_attack()
    if attack.has_state:
        raise SettingError(
            f"The trigger of {spec.attack['name']!r} is made while a victim is, so it is not known for "
            "weights from elsewhere; give an attack whose settings say all of its trigger."
        )
    model = spec.fresh_net(splits.train)
    load_weights(model.net, weights, sha256=spec.weights_sha256)
    model.eval().to(device)
    scores: dict[Split, Scores] = {}
    for sets in (EvalSets.of(attack, splits.val, "val"), EvalSets.of(attack, splits.test, "test")):
        scores[sets.split] = evaluate(model, sets.to(device))
    size = splits.train.images.shape[-1]
    victim = Victim(spec, model.cpu(), attack, splits.train.classes, scores, image_size=size)
    _refuse_if_useless(victim)
    return victim


def _refuse_if_useless(victim: Victim) -> None:
    spec, scores = victim.spec, victim.scores["val"]
    numbers = f"ACC {scores.clean_accuracy:.3f}, ASR {scores.attack_success:.3f} on val"
    given = spec.weights is not None
    if not spec.is_control and scores.attack_success < spec.min_attack_success:
        raise VictimRefusedError(
            f"The attack of {spec.name} was not learned ({numbers}; `min_attack_success` is "
            f"{spec.min_attack_success:g}); "
            + ("give the trigger of these weights." if given else "poison more or train longer.")
        )
    if scores.clean_accuracy < spec.min_clean_accuracy:
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
    root.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".victim-", dir=root))
    try:
        # copies: tied weights would share memory, which safetensors refuses
        state = victim.model.state_dict()
        copies = {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}
        save_file(copies, part / WEIGHTS)
        manifest = {
            "spec": victim.spec.model_dump(),
            "spec_digest": victim.spec.digest,
            "weights_sha256": file_sha256(part / WEIGHTS),
            "in_channels": victim.model.get_buffer("mean").shape[1],
            "image_size": victim.image_size,
            "classes": list(victim.classes),
            "scores": {split: asdict(scores) for split, scores in victim.scores.items()},
            "torch": torch.__version__,
        }
        if victim.attack.has_state:
            save_file(victim.attack.state(), part / TRIGGER)
            manifest["trigger_sha256"] = file_sha256(part / TRIGGER)
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        part.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def load_victim(folder: Path, *, own_code: bool = False) -> Victim:
    """Read a victim back.

    Args:
        own_code: whether the code that the manifest names for an own net may be imported and run. A
            manifest from someone else could name any.

    Raises:
        VictimError: a file is missing, damaged, or not the one the manifest names; own code is not
            allowed, or changed.
        VictimRefusedError: its scores are below its bounds.
    """
    again = f"remove {folder} to train it anew"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if is_own(net_name := manifest["spec"]["net"]) and not own_code:
            raise VictimError(
                f"The victim {folder} is built by the code {net_name!r}, which may do anything; if you "
                "trust it, allow it with `own_code=True` or --trust-code."
            )
        spec = VictimSpec.model_validate(manifest["spec"])
        scores: dict[Split, Scores] = {
            "val": Scores(**manifest["scores"]["val"]),
            "test": Scores(**manifest["scores"]["test"]),
        }
        classes, in_channels = tuple(manifest["classes"]), manifest["in_channels"]
        image_size = manifest.get("image_size", spec.image_size)
        promised, promised_spec = manifest["weights_sha256"], manifest["spec_digest"]
        attack = spec.build_attack()
        promised_trigger = manifest["trigger_sha256"] if attack.has_state else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise VictimError(
            f"The manifest {folder / MANIFEST} cannot be read ({type(error).__name__}: {error}); "
            f"{again}."
        ) from error
    if promised_spec != spec.digest:
        raise VictimError(
            f"The spec in {folder / MANIFEST} has the digest {spec.digest}, but the manifest says "
            f"{promised_spec}: it was edited; {again}."
        )
    weights = _promised(folder / WEIGHTS, promised, "victim's file of weights", again)
    ones = [1.0] * in_channels
    net = spec.net_of(ones, ones, in_channels, len(classes), image_size)
    try:
        net.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise VictimError(f"The weights {weights} do not fit {spec.net}: {error}; {again}.") from error
    if promised_trigger is not None:
        trigger = _promised(folder / TRIGGER, promised_trigger, "file of the trigger's state", again)
        try:
            attack.load_state(load_file(trigger))
        except (SafetensorError, SettingError) as error:
            raise VictimError(
                f"The trigger's state {trigger} is of no use: {error} {again}."
            ) from error
    victim = Victim(spec, net.eval(), attack, classes, scores, image_size=image_size)
    _refuse_if_useless(victim)
    return victim


def obtain_victim(
    spec: VictimSpec,
    root: Path,
    *,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[EpochLog], None] | None = None,
) -> Victim:
    """The victim of this spec: loaded from `root/DIGEST/` if it is there, else trained and saved."""
    if (root / spec.digest).is_dir():
        victim = load_victim(root / spec.digest, own_code=True)
        if victim.spec.digest != spec.digest:
            raise VictimError(
                f"{root / spec.digest} holds the victim {victim.spec.digest}; remove it to train anew."
            )
        # the caller's bounds may be stricter than the saved ones
        victim = replace(victim, spec=spec)
        _refuse_if_useless(victim)
        return victim
    victim = train_victim(spec, device=device, on_epoch=on_epoch)
    # the same bits as the next time it is asked for
    return load_victim(save_victim(victim, root), own_code=True)


def _promised(path: Path, sha256: str, what: str, again: str) -> Path:
    """The path, if the file there is the one that the manifest names."""
    if not path.is_file():
        raise VictimError(f"The {what} {path} is missing; {again}.")
    if (found := file_sha256(path)) != sha256:
        raise VictimError(
            f"The digest of {path} is {found[:16]}, but its manifest says {sha256[:16]}: the file is "
            f"damaged or another one; {again}."
        )
    return path
