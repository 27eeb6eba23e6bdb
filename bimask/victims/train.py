"""How a victim is made: trained, or adopted with the weights that it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from bimask.attacks import Attack
from bimask.data import ImageData
from bimask.errors import SettingError, VictimError, describe
from bimask.metrics import EvalSets, Scores, Split, evaluate
from bimask.nets.weights import load_weights
from bimask.victims import folders
from bimask.victims.files import Victim, load_victim, refuse_if_useless, save_victim
from bimask.victims.imported_files import is_imported
from bimask.victims.spec import VictimSpec
from bimask.victims.stored import shared_out
from bimask.victims.training import fit
from bimask.victims.training_state import Checkpoint


@dataclass(frozen=True)
class EpochLog:
    """Progress of training: the epoch just done (from 1), its mean loss, and now and then scores."""

    epoch: int
    epochs: int
    loss: float
    scores: Scores | None


OnPrepare = Callable[[str, int, int], None]  # what is prepared, steps done, of how many


def train_victim(
    spec: VictimSpec,
    *,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[EpochLog], None] | None = None,
    on_prepare: OnPrepare | None = None,
    checkpoints: Path | None = None,
) -> Victim:
    """Train a backdoored model; the same spec gives the same weights on the same hardware.

    With `weights` or `imported` in the spec the model is loaded, not trained.

    Args:
        on_prepare: called while what the attack needs is made: with "clean net" and its epochs, with
            "trigger" and the attack's own steps.
        checkpoints: a folder for the state after every epoch. What a killed training of the same spec
            and images left there is gone on from, to the same bits; it stays there at the end.

    Raises:
        VictimRefusedError: attack not learned or accuracy poor, with the numbers.
        VictimError: weights that cannot be read or do not fit.
        NonFiniteError: the training diverged.
        DataError, SettingError: from the data, the attack or the net.
    """
    if spec.imported is not None:
        return _imported(spec, device)
    if spec.weights is not None:
        return _adopt(spec, Path(spec.weights), device)
    splits, attack = spec.load_data(), spec.build_attack()
    train, rates, recipe = splits.train.to(device), spec.rates(), spec.recipe()
    # a rate that cannot be is refused before any training
    share = 0.0 if spec.is_control else attack.share(train, **rates)

    def kept(name: str) -> Checkpoint | None:
        if checkpoints is None:
            return None
        key = f"{spec.digest} {splits.train.digest}"
        return Checkpoint(checkpoints / f"{name}.safetensors", key)

    _prepare(attack, train, spec, kept, on_prepare or _nobody)

    def sets(split: Split) -> EvalSets:  # anew: the attack may learn while the victim does
        return EvalSets.of(attack, splits.val if split == "val" else splits.test, split)

    sets("val")  # a null trigger is refused before the training, too

    def report(epoch: int, loss: float, net: nn.Module) -> None:
        if on_epoch is not None:
            due = epoch % max(1, spec.epochs // 10) == 0
            scores = evaluate(net, sets("val").to(device)) if due else None
            on_epoch(EpochLog(epoch, spec.epochs, loss, scores))

    recipe |= {"on_epoch": report, "checkpoint": kept("victim")}
    if spec.is_control:
        net = fit(train, **recipe)
    elif attack.batchwise:
        net = fit(train, attack=attack, share=share, **recipe)
    else:
        net = fit(attack.poison(train, seed=spec.seed, **rates).data, **recipe)
    scores: dict[Split, Scores] = {
        split: evaluate(net, sets(split).to(device)) for split in ("val", "test")
    }
    size = splits.train.images.shape[-1]
    victim = Victim(spec, net.cpu(), attack, splits.train.classes, scores, image_size=size)
    refuse_if_useless(victim)
    return victim


def _prepare(
    attack: Attack,
    train: ImageData,
    spec: VictimSpec,
    kept: Callable[[str], Checkpoint | None],
    tell: OnPrepare,
) -> None:
    """Make the attack ready, or find it so in its checkpoint."""
    trigger = kept("trigger") if attack.has_state else None
    if trigger is not None and (found := trigger.load()) is not None:
        attack.resume_learning(found[0], train.images.device)
        return
    if spec.is_control and not attack.has_state:
        return  # only poisoning would need it

    def clean_net(clean: ImageData) -> nn.Module:
        return fit(
            clean,
            on_epoch=lambda epoch, _loss, _net: tell("clean net", epoch, spec.epochs),
            checkpoint=kept("clean-net"),
            **spec.recipe(),
        )

    attack.prepare(
        train, seed=spec.seed, fit_net=clean_net, on_step=lambda done, of: tell("trigger", done, of)
    )
    if trigger is not None:
        trigger.save(attack.learning_state(), {})


def _nobody(what: str, done: int, of: int) -> None:
    """Nobody is told."""


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
    refuse_if_useless(victim)
    return victim


def _imported(spec: VictimSpec, device: torch.device | str) -> Victim:
    """A model of another framework, with its scores on the parts of its stored images."""
    found = spec.load_imported()
    splits, stored = shared_out(found)
    victim = Victim(
        spec,
        found.model.eval(),
        spec.build_attack(),
        found.classes,
        {},
        image_size=found.sets.clean.images.shape[-1],
        stored=stored,
    )
    sets: list[Split] = ["val", "test"]
    found.model.to(device)
    scores = {s: evaluate(found.model, victim.eval_sets(splits, s).to(device)) for s in sets}
    found.model.cpu()
    victim = replace(victim, scores=scores)
    refuse_if_useless(victim)
    return victim


def open_victim(folder: Path, *, own_code: bool = False, device: torch.device | str = "cpu") -> Victim:
    """The victim in a folder, whether it was trained here or imported; errors as of `load_victim`.

    Args:
        device: what an imported one is scored on; it was accepted as it is when it was imported.
    """
    if not is_imported(folder):
        return load_victim(folder, own_code=own_code)
    try:
        spec = VictimSpec(imported=str(folder), min_clean_accuracy=0, min_attack_success=0)
    except ValidationError as error:
        raise VictimError(f"{folder}: {describe(error)}") from error
    return _imported(spec, device)


def obtain_victim(
    spec: VictimSpec,
    root: Path,
    *,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[EpochLog], None] | None = None,
    on_prepare: OnPrepare | None = None,
) -> Victim:
    """The victim of this spec: loaded from `root/DIGEST/` if it is there, else trained and saved.

    While it is trained, its state after every epoch is in `root/.training-DIGEST/`: the next call goes
    on from there if this one is killed. An imported victim stays where it is and is scored anew.
    Arguments and errors as of `train_victim`.
    """
    if spec.imported is not None:
        return train_victim(spec, device=device)

    def load(folder: Path) -> Victim:
        victim = replace(load_victim(folder, own_code=True, known=spec), spec=spec)
        refuse_if_useless(victim)  # the caller's bounds may be stricter than the saved ones
        return victim

    def train(checkpoints: Path) -> Victim:
        return train_victim(
            spec, device=device, on_epoch=on_epoch, on_prepare=on_prepare, checkpoints=checkpoints
        )

    return folders.obtain(root, spec.digest, load=load, train=train, save=save_victim)
