"""How a victim is made: trained, or adopted with the weights that it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bimask.detection.attacks import PoisonedDetection
from bimask.detection.attacks.base import some_of
from bimask.detection.metrics import DetectionScores, evaluate
from bimask.detection.nets import Detector
from bimask.detection.objects import DetectionData, DetectionSplits, moved
from bimask.detection.victims.files import (
    DetectionVictim,
    load_victim,
    refuse_if_useless,
    save_victim,
)
from bimask.detection.victims.spec import DetectorSpec
from bimask.detection.victims.training import fit
from bimask.metrics import Split
from bimask.nets.weights import load_weights
from bimask.victims import folders
from bimask.victims.training_state import Checkpoint

TOLD = 4  # times that a victim is scored while it is trained


@dataclass(frozen=True)
class EpochLog:
    """Progress of training: the epoch just done (from 1), its mean loss, and now and then scores."""

    epoch: int
    epochs: int
    loss: float
    scores: DetectionScores | None


def train_victim(
    spec: DetectorSpec,
    *,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[EpochLog], None] | None = None,
    checkpoints: Path | None = None,
) -> DetectionVictim:
    """Train a backdoored detector; the same spec gives the same weights on the same hardware.

    With `weights` in the spec the net is loaded, not trained.

    Args:
        checkpoints: a folder for the state after every epoch. What a killed training of the same spec
            and pictures left there is gone on from, to the same bits; it stays there at the end.

    Raises:
        VictimRefusedError: attack not learned or precision poor, with the numbers.
        VictimError: weights that cannot be read or do not fit.
        NonFiniteError: the training diverged.
        ModelError: the net is no detector.
        DataError, SettingError: from the data, the attack or the net.
    """
    splits = spec.load_data()
    spec.attack.require_classes(splits.train.num_classes)
    if spec.weights is not None:
        model = spec.net_for(splits.train)
        load_weights(model.net, Path(spec.weights), sha256=spec.weights_sha256)
        return _scored(spec, model.eval().to(device), splits, device)
    val = spec.attack.sets(splits.val, "val").to(device)

    def report(epoch: int, loss: float, net: Detector) -> None:
        if on_epoch is not None:
            due = epoch % max(1, spec.epochs // TOLD) == 0
            on_epoch(EpochLog(epoch, spec.epochs, loss, evaluate(net, val) if due else None))

    checkpoint = None
    if checkpoints is not None:
        key = f"{spec.digest} {splits.train.digest}"
        checkpoint = Checkpoint(checkpoints / "victim.safetensors", key)
    poisoned = poisoned_by(spec, splits.train)
    poisoned = PoisonedDetection(
        poisoned.data.to(device), tuple(moved(target, device) for target in poisoned.triggered)
    )
    net = fit(poisoned, **spec.recipe(), on_epoch=report, checkpoint=checkpoint)
    return _scored(spec, net, splits, device)


def poisoned_by(spec: DetectorSpec, clean: DetectionData) -> PoisonedDetection:
    """What a victim of this spec is trained on, always the same; a control's is clean.

    Raises:
        DataError, SettingError: as of `DetectionAttack.poison`.
    """
    if spec.is_control:
        none = tuple(
            some_of(target, torch.zeros_like(target["labels"]).bool()) for target in clean.targets
        )
        return PoisonedDetection(clean, none)
    # a stream of its own: the order of the training is drawn by the seed as well
    generator = torch.Generator().manual_seed(2**32 + spec.seed)
    return spec.attack.poison(clean, rate=spec.poisoning_rate, generator=generator)


def _scored(
    spec: DetectorSpec, model: Detector, splits: DetectionSplits, device: torch.device | str
) -> DetectionVictim:
    parts: dict[Split, DetectionData] = {"val": splits.val, "test": splits.test}
    scores = {
        split: evaluate(model, spec.attack.sets(data, split).to(device))
        for split, data in parts.items()
    }
    victim = DetectionVictim(spec, model.cpu(), spec.attack, splits.train.classes, scores)
    refuse_if_useless(victim)
    return victim


def obtain_victim(
    spec: DetectorSpec,
    root: Path,
    *,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[EpochLog], None] | None = None,
) -> DetectionVictim:
    """The victim of this spec: loaded from `root/DIGEST/` if it is there, else trained and saved.

    While it is trained, its state after every epoch is in `root/.training-DIGEST/`: the next call goes
    on from there if this one is killed. Arguments and errors as of `train_victim`.
    """

    def load(folder: Path) -> DetectionVictim:
        victim = replace(load_victim(folder, own_code=True, known=spec), spec=spec)
        refuse_if_useless(victim)  # the caller's bounds may be stricter than the saved ones
        return victim

    def train(checkpoints: Path) -> DetectionVictim:
        return train_victim(spec, device=device, on_epoch=on_epoch, checkpoints=checkpoints)

    return folders.obtain(root, spec.digest, load=load, train=train, save=save_victim)
