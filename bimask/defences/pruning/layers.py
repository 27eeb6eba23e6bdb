"""Layers that are pruned and masked: which a model calls, which batch norm stands behind which
convolution, masks on the scales of batch norms, and how far these may be pruned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bimask.defences.base import CleanData, Passes
from bimask.defences.held_out import accuracy, split
from bimask.defences.loop import logits_of
from bimask.errors import ModelError
from bimask.masking.discovery import watched
from bimask.masking.sites import CONVOLUTIONS
from bimask.nets.admission import admit

BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
THRESHOLD_STEP = 0.05  # between the thresholds that are tried


def admitted(
    model: nn.Module, images: Tensor, kinds: tuple[type[nn.Module], ...] = BatchNorm
) -> tuple[nn.Module, list[str]]:
    """A copy of the model that answers with logits, and the modules of these kinds that it calls, in
    the order of their first calls. A layer that computes with other weights than it holds (weight norm)
    is left out.

    Args:
        images: (N, C, H, W) float in [0, 1], N >= 1.

    Raises:
        ModelError: the model cannot be defended at all.
    """
    net = admit(model, images).model
    names = [
        name
        for name, module in net.named_modules()
        if isinstance(module, kinds) and module._parameters.get("weight") is not None
    ]
    with torch.no_grad(), watched(net, names) as seen:
        net(images[:1].to(next(net.parameters()).dtype))
    return net, list(seen)


def with_norms(model: nn.Module, images: Tensor, method: str) -> tuple[nn.Module, list[str]]:
    """The same, of a model that has batch norms.

    Raises:
        ModelError: it has none.
    """
    net, names = admitted(model, images)
    if not names:
        raise ModelError(
            f"{method} prunes or masks channels of batch norms, and this model has none with a scale; "
            "take another defence, such as `ims`."
        )
    return net, names


def with_convolutions(model: nn.Module, images: Tensor, method: str) -> tuple[nn.Module, list[str]]:
    """The same, of a model that has convolutions.

    Raises:
        ModelError: it has none with weights of its own.
    """
    net, names = admitted(model, images, CONVOLUTIONS)
    if not names:
        raise ModelError(
            f"{method} prunes or masks convolutions, and this model has none with weights of its own; "
            "take another defence, such as `ims`."
        )
    return net, names


def weight_of(net: nn.Module, name: str) -> nn.Parameter:
    """The weight of a layer."""
    weight = net.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter)
    return weight


@torch.no_grad()
def pairs(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Batch norm -> the convolution whose output it gets as it is, as one forward pass shows.

    By the order of calls or of modules, a batch norm behind a sum would be paired with a convolution
    whose channels it does not scale.
    """
    made: list[tuple[Tensor, str]] = []  # outputs are kept alive, so that no other gets their address
    found: dict[str, str] = {}
    handles = []

    def convolved(name: str) -> Any:
        return lambda _module, _args, output: made.append((output, name))

    def normed(name: str) -> Any:
        def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
            for output, convolution in made:
                if args[0] is output:
                    found[name] = convolution

        return look

    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
            handles.append(module.register_forward_hook(convolved(name)))
        elif isinstance(module, BatchNorm) and module.affine and module.running_var is not None:
            handles.append(module.register_forward_pre_hook(normed(name)))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def outliers(values: Tensor, u: float) -> Tensor:
    """Which of a layer's channels (C,) are more than `u` standard deviations above their mean; a layer
    of one channel has none."""
    return values > values.mean() + u * (values.std() if len(values) > 1 else 0)


def without(net: nn.Module, out: Mapping[str, Tensor], *parts: str) -> dict[str, Tensor]:
    """The tensors of batch norms that are 0 for the channels `out`, norm -> (C,) bool.

    Args:
        parts: `weight`, `bias` or both.
    """
    tensors = {}
    for name, channels in out.items():
        for part in parts:
            own = getattr(net.get_submodule(name), part)
            if own is not None:
                tensors[f"{name}.{part}"] = own.detach().masked_fill(channels.to(own.device), 0)
    return tensors


def share_of(out: Mapping[str, Tensor]) -> float:
    """The share of channels that are out, in [0, 1]."""
    return sum(int(c.sum()) for c in out.values()) / sum(len(c) for c in out.values())


class NormMasks(nn.Module):
    """A mask (C,) on the scale of every one of these batch norms, 1 at first.

    Attributes:
        names: of the norms.
        values: their masks, in the same order.
    """

    def __init__(self, net: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.values = nn.ParameterList([torch.ones_like(weight_of(net, n)) for n in self.names])

    def scaled(self, net: nn.Module, noise: Iterable[Tensor] | None = None) -> dict[str, Tensor]:
        """The scales of the norms times their masks, to which `noise` is added."""
        factors: Iterable[Tensor] = self.values
        if noise is not None:
            factors = [mask + n for mask, n in zip(self.values, noise, strict=True)]
        return {
            f"{name}.weight": weight_of(net, name) * factor
            for name, factor in zip(self.names, factors, strict=True)
        }

    @torch.no_grad()
    def clamp_(self, lowest: Iterable[float] | None = None) -> None:
        """Put masks back into [lowest, 1], one lowest a norm; 0 where none is given."""
        for mask, low in zip(self.values, lowest or [0.0] * len(self.names), strict=True):
            mask.clamp_(low, 1)

    def below(self, threshold: float) -> dict[str, Tensor]:
        """Norm -> (C,), whether a channel's mask is below a threshold."""
        return {
            name: mask.detach() < threshold for name, mask in zip(self.names, self.values, strict=True)
        }


def ask(net: nn.Module, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Logits (N, K) of the net with these tensors in place of its own."""
    return logits_of(lambda x: functional_call(net, dict(tensors), (x,)), images)


def to_choose_by(
    clean: CleanData, share: float, max_drop: float | None, generator: torch.Generator
) -> tuple[CleanData, CleanData | None]:
    """Images to learn on, and those held back to choose a threshold by; none of them without a bound to
    choose by."""
    return (clean, None) if max_drop is None else split(clean, share, generator)


@torch.no_grad()
def prune_below(
    net: nn.Module,
    masks: NormMasks,
    choose: CleanData | None,
    *,
    highest: float,
    max_drop: float | None,
    passes: Passes,
    learned: CleanData,
) -> dict[str, Tensor]:
    """Norm -> (C,), which channels go: those below the last threshold of 0.05, 0.10, ..., `highest`
    before one under which the share `max_drop` of the net's accuracy on `choose` is lost. Without a
    bound, those below `highest`. The accuracy on the images learned on must hold as well: of twenty
    images held back, two errors more are a tenth, and the luckiest threshold would win.

    Args:
        net: whose channels go.
        passes: to count on.
    """
    if choose is None or max_drop is None:
        return masks.below(highest)
    dtype = masks.values[0].dtype
    checked = [CleanData(part.images.to(dtype), part.labels) for part in (choose, learned)]
    was = net.training
    net.eval()

    def right(out: Mapping[str, Tensor]) -> list[float]:
        passes.add(forward=len(checked), backward=0)
        tensors = without(net, out, "weight")
        return [accuracy(lambda x: ask(net, tensors, x), part) for part in checked]

    good = masks.below(0)  # none
    least = [known * (1 - max_drop) for known in right(good)]
    tried = [THRESHOLD_STEP * number for number in range(1, round(1 / THRESHOLD_STEP))]
    for threshold in [*(t for t in tried if t < highest), highest]:
        out = masks.below(threshold)
        if share_of(out) > share_of(good) and any(
            found < bound for found, bound in zip(right(out), least, strict=True)
        ):
            break
        good = out
    net.train(was)
    return good


def freeze_statistics(net: nn.Module) -> None:
    """Batch norms of `net` in training mode take the statistics of a batch, and keep their own."""
    for module in net.modules():
        if isinstance(module, BatchNorm):
            module.momentum = 0.0
