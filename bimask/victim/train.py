"""How a victim is made: trained, or adopted with the weights that it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from bimask.errors import SettingError, VictimError
from bimask.metrics import EvalSets, Scores, Split, evaluate
from bimask.suspect import load_weights
from bimask.training import fit
from bimask.victim.files import Victim, load_victim, refuse_if_useless, save_victim
from bimask.victim.spec import VictimSpec


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
    refuse_if_useless(victim)
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
    refuse_if_useless(victim)
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
        refuse_if_useless(victim)
        return victim
    victim = train_victim(spec, device=device, on_epoch=on_epoch)
    # the same bits as the next time it is asked for
    return load_victim(save_victim(victim, root), own_code=True)
