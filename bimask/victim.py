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
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bimask.attacks import Attack, build_attack
from bimask.data import LOADERS, Splits, load_data
from bimask.errors import SettingError, VictimError, VictimRefusedError
from bimask.metrics import EvalSets, Scores, Split, evaluate
from bimask.nets import NETS, build_net
from bimask.training import fit

WEIGHTS, TRIGGER, MANIFEST = "victim.safetensors", "trigger.safetensors", "manifest.json"


class VictimSpec(BaseModel):
    """All that a victim is made of. Two specs that differ in nothing but bounds share a digest.

    The recipe is that of `bimask.training.fit` on the training split; the last epoch is kept, nothing
    is chosen on `val` or `test`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = "digits"
    image_size: int | None = Field(None, ge=4, le=1024)
    net: str = "small_resnet"
    width: int = Field(16, ge=1)
    attack: dict[str, Any] = Field(default_factory=lambda: {"name": "badnets"})
    poisoning_rate: float = Field(0.1, gt=0, le=1)
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
        if self.net not in NETS:
            raise ValueError(f"unknown net {self.net!r}, known are {', '.join(sorted(NETS))}")
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
        """Sixteen hex digits of everything that decides the weights."""
        deciding = self.model_dump(exclude={"min_clean_accuracy", "min_attack_success"})
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """For people: dataset and attack."""
        dataset = Path(self.dataset.removeprefix("imagefolder:")).name
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", dataset).strip("-") or "images"
        return f"{readable}-{self.attack['name']}"

    def build_attack(self) -> Attack:
        """The attack with its hyper-parameters; a victim's own is ready for images as well."""
        return build_attack(**self.attack)

    def recipe(self) -> dict[str, Any]:
        """What `bimask.training.fit` is told of net and training."""
        keys = ("net", "width", "epochs", "batch_size", "lr", "weight_decay")
        return self.model_dump(include={*keys, "shift", "flip", "precision", "seed"})

    def rates(self) -> dict[str, Any]:
        """What the attack is told of how many samples to poison."""
        return {"rate": self.poisoning_rate, "rate_of": self.poisoning_rate_of}

    def load_data(self) -> Splits:
        """The clean data the victim was made from."""
        return load_data(self.dataset, image_size=self.image_size)


@dataclass(frozen=True)
class Victim:
    """A trained model with a known backdoor.

    Attributes:
        spec: what it was made of.
        model: images in [0, 1] -> logits, in eval mode.
        attack: ready to put the victim's own trigger on new images.
        classes: names.
        scores: of the victim itself, on "val" and "test".
    """

    spec: VictimSpec
    model: nn.Module
    attack: Attack
    classes: tuple[str, ...]
    scores: dict[Split, Scores]

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

    Raises:
        VictimRefusedError: attack not learned or accuracy poor, with the numbers.
        NonFiniteError: the training diverged.
        DataError, SettingError: from the data or the attack.
    """
    splits, attack = spec.load_data(), spec.build_attack()
    train, rates = splits.train.to(device), spec.rates()
    share = attack.share(train, **rates)  # a rate that cannot be is refused before any training
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

    if attack.batchwise:
        net = fit(train, attack=attack, share=share, on_epoch=report, **recipe)
    else:
        poisoned = attack.poison(train, seed=spec.seed, **rates).data
        net = fit(poisoned, on_epoch=report, **recipe)
    scores: dict[Split, Scores] = {
        split: evaluate(net, sets(split).to(device)) for split in ("val", "test")
    }
    victim = Victim(spec, net.cpu(), attack, splits.train.classes, scores)
    _refuse_if_useless(victim)
    return victim


def _refuse_if_useless(victim: Victim) -> None:
    spec, scores = victim.spec, victim.scores["val"]
    numbers = f"ACC {scores.clean_accuracy:.3f}, ASR {scores.attack_success:.3f} on val"
    if scores.attack_success < spec.min_attack_success:
        raise VictimRefusedError(
            f"The attack of {spec.name} was not learned ({numbers}; `min_attack_success` is "
            f"{spec.min_attack_success:g}); poison more or train longer."
        )
    if scores.clean_accuracy < spec.min_clean_accuracy:
        raise VictimRefusedError(
            f"The clean accuracy of {spec.name} is poor ({numbers}; `min_clean_accuracy` is "
            f"{spec.min_clean_accuracy:g}); train longer or widen the net."
        )


def save_victim(victim: Victim, root: Path) -> Path:
    """Write `root/DIGEST/` with weights and trigger state (safetensors) and manifest (JSON), whole or
    not at all. An attack without state has no file for it."""
    folder = root / victim.spec.digest
    root.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".victim-", dir=root))
    try:
        state = {name: value.contiguous() for name, value in victim.model.state_dict().items()}
        save_file(state, part / WEIGHTS)
        manifest = {
            "spec": victim.spec.model_dump(),
            "spec_digest": victim.spec.digest,
            "weights_sha256": _sha256(part / WEIGHTS),
            "in_channels": victim.model.get_buffer("mean").shape[1],
            "classes": list(victim.classes),
            "scores": {split: asdict(scores) for split, scores in victim.scores.items()},
            "torch": torch.__version__,
        }
        if victim.attack.has_state:
            save_file(victim.attack.state(), part / TRIGGER)
            manifest["trigger_sha256"] = _sha256(part / TRIGGER)
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        part.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def load_victim(folder: Path) -> Victim:
    """Read a victim back.

    Raises:
        VictimError: a file is missing, damaged, or not the one the manifest names.
        VictimRefusedError: its scores are below its bounds.
    """
    again = f"remove {folder} to train it anew"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        spec = VictimSpec.model_validate(manifest["spec"])
        scores: dict[Split, Scores] = {
            "val": Scores(**manifest["scores"]["val"]),
            "test": Scores(**manifest["scores"]["test"]),
        }
        classes, in_channels = tuple(manifest["classes"]), manifest["in_channels"]
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
    net = build_net(
        spec.net,
        in_channels=in_channels,
        num_classes=len(classes),
        width=spec.width,
        mean=ones,
        std=ones,
    )
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
    victim = Victim(spec, net.eval(), attack, classes, scores)
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
        victim = load_victim(root / spec.digest)
        if victim.spec.digest != spec.digest:
            raise VictimError(
                f"{root / spec.digest} holds the victim {victim.spec.digest}; remove it to train anew."
            )
        # the caller's bounds may be stricter than the saved ones
        victim = replace(victim, spec=spec)
        _refuse_if_useless(victim)
        return victim
    victim = train_victim(spec, device=device, on_epoch=on_epoch)
    return load_victim(save_victim(victim, root))  # the same bits as the next time it is asked for


def _promised(path: Path, sha256: str, what: str, again: str) -> Path:
    """The path, if the file there is the one that the manifest names."""
    if not path.is_file():
        raise VictimError(f"The {what} {path} is missing; {again}.")
    if (found := _sha256(path)) != sha256:
        raise VictimError(
            f"The digest of {path} is {found[:16]}, but its manifest says {sha256[:16]}: the file is "
            f"damaged or another one; {again}."
        )
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
