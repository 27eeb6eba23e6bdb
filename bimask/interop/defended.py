"""BackdoorBench's `defense_result.pt`, and the files beside it that are not a cleaned model.

What each defence leaves behind is known from its files: fine-pruning keeps the two parts of its pruned
layer, AWN and NFT keep their neuron masks, NPD and (in one case) Neural Cleanse save the victim itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bimask.errors import InteropError
from bimask.files.safe import load_foreign, state_dict
from bimask.files.stand_ins import shown
from bimask.interop import backdoorbench
from bimask.nets.fitting import fit_net
from bimask.victims.imported import ImportedVictim, score

DEFENSE_FILE = "defense_result.pt"
KEYS = frozenset({"model_name", "num_classes", "model"})
NOISE = (".neuron_noise", ".neuron_noise_bias")  # never written to: whatever was in memory
PLUG = frozenset({"target_layer", "plug_name", "plug_model"})

NOT_A_MODEL = {  # by name, since these are pickles that need not be opened to know them
    "mask.pkl": "the pickled masks of the IMS program",
    "channel_selection.pkl": "the pickled channel selections of the IMS program",
}


def is_defense_result(content: object) -> bool:
    """Three keys, and not the eight of an attack."""
    return (
        isinstance(content, dict)
        and content.keys() >= KEYS
        and not backdoorbench.is_attack_result(content)
    )


def refuse_other_results(path: Path, content: object = None) -> None:
    """Say what a defence's file is that holds no model.

    Raises:
        InteropError: it is one of those known.
    """
    if path.name in NOT_A_MODEL:
        raise InteropError(
            f"{path} is not a cleaned model but {NOT_A_MODEL[path.name]}; it belongs to a victim "
            "and has no weights, so import the victim and purify it."
        )
    if isinstance(content, dict) and content.keys() >= PLUG:
        raise InteropError(
            f"{path} is not a cleaned model but NPD's plug layer, which goes before "
            f"{shown(content['target_layer'])} of the victim; no net of ours has a place for it."
        )


def read_defense_result(
    path: Path, *, clean_data: str | None = None, device: torch.device | str = "cpu"
) -> ImportedVictim:
    """The defended model, scored on the stored images of its victim, with the victim's own scores.

    The victim's `attack_result.pt` is looked for in the folders above.

    Raises:
        InteropError: no victim above it, hostile or broken, or weights that are still the victim's.
    """
    return from_content(load_foreign(path), path, clean_data=clean_data, device=device)


def from_content(
    content: Any, path: Path, *, clean_data: str | None = None, device: torch.device | str = "cpu"
) -> ImportedVictim:
    """The same, of what `load_foreign` gave."""
    refuse_other_results(path, content)
    if not is_defense_result(content):
        raise InteropError(
            f"{path} is not BackdoorBench's defense_result.pt: it must hold {', '.join(sorted(KEYS))}."
        )
    attack = _attack_above(path)
    victim = backdoorbench.read_attack_result(attack, clean_data=clean_data, device=device)
    net, classes = backdoorbench.net_name(content["model_name"], str(path)), content["num_classes"]
    if (net, classes) != (victim.net, len(victim.classes)):
        raise InteropError(
            f"{path} is a {shown(net)} of {shown(classes)} classes, but its victim {attack} is a "
            f"{victim.net} of {len(victim.classes)}; put it below its own victim."
        )
    state, notes = fold_parts(state_dict(content["model"], f"{path}: `model`"), str(path))
    mean, std = victim.model.mean.flatten().tolist(), victim.model.std.flatten().tolist()
    model, width = fit_net(
        victim.net, state, num_classes=len(victim.classes), mean=mean, std=std, what=str(path)
    )
    before = victim.model.state_dict()
    if all(torch.equal(value, before[name]) for name, value in model.state_dict().items()):
        why = "and NPD's cure is in plug_layer.pt beside it"
        if not (path.parent / "plug_layer.pt").exists():
            why = "as NPD's and some of Neural Cleanse's are; what cured it was not saved in it"
        raise InteropError(f"{path} is not a cleaned model: its weights are the victim's, {why}.")
    if "fst" in path.parent.parts:
        notes += ("The folder defense/fst is written by nine methods: its name does not tell which.",)
    return replace(
        victim,
        source="backdoorbench defense",
        model=model,
        width=width,
        scores=score(model, victim.sets, device),
        before=victim.scores,
        notes=victim.notes + notes,
    )


def _attack_above(path: Path) -> Path:
    for folder in list(path.absolute().parents)[1:6]:
        if (folder / backdoorbench.ATTACK_FILE).is_file():
            return folder / backdoorbench.ATTACK_FILE
    raise InteropError(
        f"{path} holds a model and no images, and no {backdoorbench.ATTACK_FILE} is in the five "
        "folders above it; put it where BackdoorBench does, below its victim."
    )


def fold_parts(state: dict[str, Tensor], what: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights that a model computes with, from those it was saved in parts of.

    Fine-pruning: weight = weight_orig x weight_mask. AWN and NFT: a batch norm's weight x its
    neuron_mask; its bias stays, its noise was never used.

    Raises:
        InteropError: a part without its other one, or of another shape.
    """
    pruned = [name for name in state if name.endswith("_mask") and not name.endswith(".neuron_mask")]
    masked = [name for name in state if name.endswith(".neuron_mask")]
    folded = {
        name: value
        for name, value in state.items()
        if not name.endswith((*NOISE, ".neuron_mask", "_mask", "_orig"))
    }
    for name in pruned:
        folded[name.removesuffix("_mask")] = _product(
            state, name.removesuffix("_mask") + "_orig", name, what
        )
    for name in masked:
        gain = name.removesuffix("neuron_mask") + "weight"
        folded[gain] = _product(state, gain, name, what)
    notes: tuple[str, ...] = ()
    if pruned:
        notes += ("The file held a pruned layer in two parts (fine-pruning); they were multiplied.",)
    if masked:
        notes += ("The file held neuron masks (AWN or NFT); they were folded into the batch norms.",)
    return folded, notes


def _product(state: dict[str, Tensor], one: str, mask: str, what: str) -> Tensor:
    if one not in state or state[one].numel() != state[mask].numel():
        raise InteropError(
            f"{what} holds {shown(mask)} without a {shown(one)} of its size; get another copy of it."
        )
    return state[one] * state[mask].view_as(state[one]).to(state[one].dtype)
