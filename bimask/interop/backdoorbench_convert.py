"""A model as BackdoorBench's own net behind its own normalisation, with the same scores or not at all.

BackdoorBench has one width a net and one normalisation a data set. A narrower net fits into a wide one
beside channels that are zero throughout. Another normalisation is folded into the first convolution
and the batch norms that read its output; that is exact but for the border, where zeros are padded
behind the normalisation, so that the scores are measured again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bimask.errors import InteropError
from bimask.interop.datasets import DATASETS, Conventions
from bimask.metrics import EvalSets, evaluate
from bimask.nets import NETS, Normalised
from bimask.nets.fitting import BACKDOORBENCH_NETS, fit_net

State = dict[str, Tensor]

WIDTHS = {"preactresnet18": 64}
STEM = "conv1.weight"
READ_THE_STEM = ("layer1.0.bn1", "layer1.1.bn1", "layer2.0.bn1")  # through identity shortcuts


def convert(
    net: str, model: Normalised, dataset: str, sets: EvalSets
) -> tuple[str, State, tuple[str, ...]]:
    """BackdoorBench's name of the net, the weights it needs, and what had to be done to them.

    Args:
        net: name of the net, as of `build_net` or `fit_net`.
        dataset: a key of `DATASETS`.
        sets: the images on which the scores must stay.

    Raises:
        InteropError: a net or data set that BackdoorBench does not have, or other scores there.
    """
    if dataset not in DATASETS:
        raise InteropError(
            f"BackdoorBench has no data set {dataset!r}; say with --dataset which of its own the "
            f"images are: {', '.join(DATASETS)}."
        )
    conventions, channels = DATASETS[dataset], sets.clean.images.shape[1]
    if (sets.clean.num_classes, channels) != (conventions.classes, len(conventions.mean)):
        raise InteropError(
            f"BackdoorBench's {dataset} has {conventions.classes} classes and {len(conventions.mean)} "
            f"channels, but this victim has {sets.clean.num_classes} and {channels}."
        )
    names = [name for name, ours in BACKDOORBENCH_NETS.items() if ours == net]
    if not names:
        known = ", ".join(BACKDOORBENCH_NETS.values())
        raise InteropError(f"BackdoorBench does not know the net {net!r}; it and we share {known}.")
    state = {key: value.cpu().contiguous() for key, value in model.net.state_dict().items()}
    notes: tuple[str, ...] = ()
    if names[0] in WIDTHS:
        state, widened = _widened(state, names[0], conventions.classes, channels)
        state, moved = _renormalised(state, model, conventions)
        notes = widened + moved
    if not notes and _same_normalisation(model, conventions):
        return names[0], state, notes
    target, _ = fit_net(
        net,
        state,
        num_classes=conventions.classes,
        mean=conventions.mean,
        std=conventions.std,
        what="the converted victim",
    )
    before, after = evaluate(model, sets), evaluate(target, sets)
    if before != after:
        raise InteropError(
            f"BackdoorBench would feed this model other numbers than it was trained on, and find ACC "
            f"{after.clean_accuracy:.4f} and ASR {after.attack_success:.4f} in place of "
            f"{before.clean_accuracy:.4f} and {before.attack_success:.4f}; train the victim behind the "
            f"normalisation of {dataset}, mean {conventions.mean} and std {conventions.std}."
        )
    return names[0], state, notes


def _same_normalisation(model: Normalised, conventions: Conventions) -> bool:
    own = torch.stack([model.mean.flatten(), model.std.flatten()]).float().cpu()
    return torch.equal(own, torch.tensor([conventions.mean, conventions.std]))


def _widened(state: State, name: str, classes: int, channels: int) -> tuple[State, tuple[str, ...]]:
    """The weights in the first channels of a net of the published width; the others are zero."""
    width, own = WIDTHS[name], state[STEM].shape[0]
    if own == width:
        return state, ()
    if own > width:
        raise InteropError(
            f"BackdoorBench's {name} has a width of {width}, but this one of {own}; train a victim "
            f"with `width: {width}` or less."
        )
    with torch.device("meta"):
        wanted = NETS[name](in_channels=channels, num_classes=classes, width=width).state_dict()
    wide = {}
    for key, value in state.items():
        filled = torch.ones if key.endswith("running_var") else torch.zeros
        wide[key] = filled(wanted[key].shape, dtype=value.dtype)
        wide[key][tuple(slice(size) for size in value.shape)] = value
    return wide, (f"Its width is {own}; the other channels, up to {width}, are zero.",)


def _renormalised(
    state: State, model: Normalised, conventions: Conventions
) -> tuple[State, tuple[str, ...]]:
    """The same function of images that are normalised otherwise, but for the border of the image.

    With z the model's and y the other's normalised image, z = y * scale + offset. The convolution of
    the offset is one number a channel, which the batch norms that read the stem's output take back.
    """
    if _same_normalisation(model, conventions):
        return state, ()
    mean, std = (part.double().flatten().cpu() for part in (model.mean, model.std))
    their_mean, their_std = (
        torch.tensor(part).double() for part in (conventions.mean, conventions.std)
    )
    scale, offset = their_std / std, (their_mean - mean) / std
    stem = state[STEM].double()
    moved = (stem.sum((2, 3)) * offset).sum(1)
    changed = {STEM: (stem * scale.view(1, -1, 1, 1)).to(state[STEM].dtype)}
    for norm in READ_THE_STEM:
        key = f"{norm}.running_mean"
        changed[key] = (state[key].double() - moved).to(state[key].dtype)
    return state | changed, (
        "Its normalisation was another; it was folded into the weights, and the scores stayed.",
    )
