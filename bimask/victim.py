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
from torch.nn import functional as F

from bimask.attacks import Attack, build_attack
from bimask.data import LOADERS, ImageData, Splits, augment, load_data
from bimask.errors import NonFiniteError, VictimError, VictimRefusedError
from bimask.metrics import EvalSets, Scores, Split, evaluate
from bimask.net_spec import NetSpec
from bimask.nets import is_own
from bimask.suspect import file_sha256, load_weights

WEIGHTS, MANIFEST = "victim.safetensors", "manifest.json"


class VictimSpec(NetSpec):
    """All that a victim is made of. Two specs that differ in nothing but bounds share a digest.

    The recipe is SGD with Nesterov momentum 0.9 under a one-cycle schedule on the poisoned training
    split; the last epoch is kept, nothing is chosen on `val` or `test`.

    With `weights` nothing is trained: the net is loaded from them and its scores under the attack's
    trigger are measured. Settings of the training then decide nothing.
    """

    dataset: str = "digits"
    image_size: int | None = Field(None, ge=4, le=1024)
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
    def name(self) -> str:
        """For people: dataset and attack."""
        dataset = Path(self.dataset.removeprefix("imagefolder:")).name
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", dataset).strip("-") or "images"
        return f"{readable}-{self.attack['name']}"

    def build_attack(self) -> Attack:
        """The attack with its hyper-parameters."""
        return build_attack(**self.attack)

    def load_data(self) -> Splits:
        """The clean data the victim was made from."""
        return load_data(self.dataset, image_size=self.image_size)


@dataclass(frozen=True)
class Victim:
    """A trained model with a known backdoor.

    Attributes:
        spec: what it was made of.
        model: images in [0, 1] -> logits, in eval mode.
        classes: names.
        scores: of the victim itself, on "val" and "test".
        image_size: height and width of its images; None where nobody wrote it down.
    """

    spec: VictimSpec
    model: nn.Module
    classes: tuple[str, ...]
    scores: dict[Split, Scores]
    image_size: int | None = None

    def eval_sets(self, splits: Splits, split: Split) -> EvalSets:
        """Clean and triggered images of one split, for the victim and for what is made of it."""
        data = splits.val if split == "val" else splits.test
        return EvalSets.of(self.spec.build_attack(), data, split)


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
    poisoned = attack.poison(
        splits.train, rate=spec.poisoning_rate, rate_of=spec.poisoning_rate_of, seed=spec.seed
    )
    val, test = EvalSets.of(attack, splits.val, "val"), EvalSets.of(attack, splits.test, "test")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        net = _fit(spec, poisoned.data.to(device), val.to(device), on_epoch)
    scores: dict[Split, Scores] = {sets.split: evaluate(net, sets.to(device)) for sets in (val, test)}
    size = splits.train.images.shape[-1]
    victim = Victim(spec, net.cpu(), splits.train.classes, scores, image_size=size)
    _refuse_if_useless(victim)
    return victim


def _adopt(spec: VictimSpec, weights: Path, device: torch.device | str) -> Victim:
    """A model that was trained elsewhere, with its scores under the spec's trigger."""
    splits, attack = spec.load_data(), spec.build_attack()
    model = spec.fresh_net(splits.train)
    load_weights(model.net, weights, sha256=spec.weights_sha256)
    model.eval().to(device)
    scores: dict[Split, Scores] = {}
    for sets in (EvalSets.of(attack, splits.val, "val"), EvalSets.of(attack, splits.test, "test")):
        scores[sets.split] = evaluate(model, sets.to(device))
    size = splits.train.images.shape[-1]
    victim = Victim(spec, model.cpu(), splits.train.classes, scores, image_size=size)
    _refuse_if_useless(victim)
    return victim


def _fit(
    spec: VictimSpec,
    data: ImageData,
    val: EvalSets,
    on_epoch: Callable[[EpochLog], None] | None,
) -> nn.Module:
    """SGD, one cycle: the weights after the last epoch, in eval mode."""
    net = spec.fresh_net(data)
    net.to(data.images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = max(1, len(data) // spec.batch_size)
    low = spec.precision == "bfloat16"
    sgd = torch.optim.SGD(
        net.parameters(), lr=spec.lr, momentum=0.9, weight_decay=spec.weight_decay, nesterov=True
    )
    cycle = torch.optim.lr_scheduler.OneCycleLR(sgd, spec.lr, total_steps=spec.epochs * steps)
    for epoch in range(1, spec.epochs + 1):
        net.train()
        losses = []
        order = torch.randperm(len(data)).to(data.images.device)
        for batch in order[: steps * spec.batch_size].chunk(steps):
            images = augment(data.floats(batch), shift=spec.shift, flip=spec.flip)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=low):
                logits = net(images)
            loss = F.cross_entropy(logits.float(), data.labels[batch])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            cycle.step()
            losses.append(loss.detach())
        mean_loss = torch.stack(losses).mean().item()
        if not mean_loss < float("inf"):
            raise NonFiniteError(
                f"The victim's training diverged in epoch {epoch}: loss {mean_loss}; lower `lr`."
            )
        if on_epoch is not None:
            due = epoch % max(1, spec.epochs // 10) == 0
            on_epoch(EpochLog(epoch, spec.epochs, mean_loss, evaluate(net, val) if due else None))
    return net.eval()


def _refuse_if_useless(victim: Victim) -> None:
    spec, scores = victim.spec, victim.scores["val"]
    numbers = f"ACC {scores.clean_accuracy:.3f}, ASR {scores.attack_success:.3f} on val"
    given = spec.weights is not None
    if scores.attack_success < spec.min_attack_success:
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
    """Write `root/DIGEST/` with weights (safetensors) and manifest (JSON), whole or not at all."""
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
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise VictimError(f"The victim's weights {weights} are missing; {again}.")
    if (found := file_sha256(weights)) != promised:
        raise VictimError(
            f"The digest of {weights} is {found[:16]}, but its manifest says {promised[:16]}: the "
            f"file is damaged or another one; {again}."
        )
    ones = [1.0] * in_channels
    net = spec.net_of(ones, ones, in_channels, len(classes), image_size)
    try:
        net.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise VictimError(f"The weights {weights} do not fit {spec.net}: {error}; {again}.") from error
    victim = Victim(spec, net.eval(), classes, scores, image_size=image_size)
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
