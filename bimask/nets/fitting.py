"""A net around foreign weights, built only if every name and shape fits."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bimask.errors import InteropError
from bimask.files.safe import refuse_non_finite
from bimask.files.stand_ins import shown
from bimask.nets import NETS, Normalised, build_net

TORCHVISION = "torchvision:"
BACKDOORBENCH_NETS: dict[str, str] = {
    "preactresnet18": "preactresnet18",
    # torchvision's own constructors, strides and all, also where we have a net of the same name that
    # is made for small images: its weights have the same shapes and would give other answers
    **{
        name: TORCHVISION + name
        for name in (
            *("convnext_tiny", "densenet161", "efficientnet_b3", "mobilenet_v3_large"),
            *("resnet18", "resnet34", "resnet50", "vgg19", "vgg19_bn"),
            *("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32"),
        )
    },
}


def fit_net(
    name: str,
    state: dict[str, Tensor],
    *,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    what: str,
) -> tuple[Normalised, int | None]:
    """The net `name` with these weights, in eval mode, and its width.

    Names and shapes are compared before anything is allocated, so that no file decides how much memory
    is taken.

    Args:
        name: of `NETS`, or `torchvision:NAME`; torchvision's vision transformers enlarge images to 224.
        state: weights by the names that the net gives them.
        mean, std: of the normalisation, one value an image channel.
        what: the file, for messages.

    Returns:
        The width of a net of `NETS` is read off its first convolution; others have None.

    Raises:
        InteropError: an unknown net, names or shapes that differ, weights that are not finite.
    """
    if name not in NETS and not name.startswith(TORCHVISION):
        raise InteropError(
            f"{what} holds weights of {shown(name)}, which is no net that is known here: known are "
            f"{', '.join(sorted(NETS.keys() | BACKDOORBENCH_NETS.keys()))}."
        )
    if type(num_classes) is not int or not 1 <= num_classes <= 100_000:
        raise InteropError(f"{what} declares {shown(num_classes)} classes, but 1 to 100000 are read.")
    refuse_non_finite(state, what)
    try:
        with torch.device("meta"):
            width = (
                None if name.startswith(TORCHVISION) else _width(name, state, num_classes, mean, std)
            )
            net = _build(name, num_classes, width, mean, std)
    except (RuntimeError, ValueError, OverflowError) as error:
        first = str(error).splitlines()[0]
        raise InteropError(f"{what}: {shown(name)} cannot be built for it: {shown(first)}.") from error
    wanted = net.state_dict()
    _refuse_misfit(name, state, wanted, what)
    own = {key: state[key].to(tensor.dtype).contiguous() for key, tensor in wanted.items()}
    net.load_state_dict(own, assign=True)
    return Normalised(net, list(mean), list(std)).eval(), width


def _build(
    name: str, num_classes: int, width: int | None, mean: Sequence[float], std: Sequence[float]
) -> nn.Module:
    """The bare net, without its normalisation."""
    if not name.startswith(TORCHVISION):
        settings = {} if width is None else {"width": width}
        whole = build_net(
            name,
            in_channels=len(mean),
            num_classes=num_classes,
            mean=list(mean),
            std=list(std),
            **settings,
        )
        return whole.net
    from torchvision.models import get_model
    from torchvision.transforms import Resize

    published = name.removeprefix(TORCHVISION)
    net: nn.Module = get_model(published, weights=None, num_classes=num_classes)
    return nn.Sequential(Resize((224, 224)), net) if published.startswith("vit_") else net


def _width(
    name: str,
    state: dict[str, Tensor],
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> int | None:
    """The net's usual width, scaled by the channels of the first convolution; None if it has none."""
    parameter = inspect.signature(NETS[name]).parameters.get("width")
    if parameter is None:
        return None
    usual: int = parameter.default
    published = _build(name, num_classes, usual, mean, std).state_dict()
    key, tensor = next((key, tensor) for key, tensor in published.items() if tensor.ndim == 4)
    if key not in state or state[key].ndim != 4:
        return usual
    return max(1, round(usual * state[key].shape[0] / tensor.shape[0]))


def _refuse_misfit(name: str, state: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    missing, odd = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or odd:
        first = f"{shown(missing[0])} is missing" if missing else f"{shown(odd[0])} is unknown"
        raise InteropError(
            f"{what} does not hold the weights of {name}: {len(missing)} names are missing and "
            f"{len(odd)} are too many ({first})."
        )
    for key, tensor in wanted.items():
        if state[key].shape != tensor.shape:
            raise InteropError(
                f"{what} does not hold the weights of this {name}: {key} is "
                f"{tuple(state[key].shape)}, but must be {tuple(tensor.shape)} for its width and "
                "number of classes."
            )
