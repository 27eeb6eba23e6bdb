"""A smaller net with the same answers: without the channels that masks took out altogether.

A convolution whose weights of a channel are exactly zero gives a constant there. Through a batch norm
and a ReLU it stays one. Where it ends as zero, the next convolution never sees it; where that one pads
nothing, any constant can move into its bias. Elsewhere removal would not be exact at the borders, and
the channel stays.

Soft masks (the paper's) come close to zero and never reach it; `mask_estimator: straight_through` does,
where the selection is 0 too.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

RELUS = (F.relu, torch.relu, "relu", "relu_")


@dataclass(frozen=True)
class Compacted:
    """A net without its dead channels.

    Attributes:
        model: with the same answers; traced, if any channel went.
        dead: channels whose weights are exactly zero.
        removed: those of them that could go.
        channels: of all convolutions together.
    """

    model: nn.Module
    dead: int
    removed: int
    channels: int


@torch.no_grad()
def compact(model: nn.Module) -> Compacted:
    """Remove what can be removed exactly; `model` is left as it is.

    Only between two plain convolutions with nothing but batch norm and ReLU in between and no other
    reader: a residual sum reads its channels by position. A model that cannot be traced keeps all.
    """
    plain = copy.deepcopy(model).eval()
    convs = [module for module in plain.modules() if isinstance(module, nn.Conv2d)]
    dead = sum(int(_dead(conv).sum()) for conv in convs)
    channels = sum(conv.out_channels for conv in convs)
    try:
        traced = fx.symbolic_trace(plain)
    except Exception:  # whatever a model's own forward does with a proxy
        return Compacted(plain, dead, 0, channels)
    modules = dict(traced.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    removed = 0
    for node in traced.graph.nodes:
        chain = _chain(node, modules, calls)
        if chain is not None:
            removed += _shorten(*chain)
    return Compacted(traced if removed else plain, dead, removed, channels)


def _dead(conv: nn.Conv2d) -> Tensor:
    """Which output channels have no weight but zeros: (C,) booleans."""
    return (conv.weight == 0).flatten(1).all(1)


def _chain(
    node: fx.Node, modules: dict[str, nn.Module], calls: Counter[object]
) -> tuple[nn.Conv2d, list[nn.Module], nn.Conv2d] | None:
    """A convolution, what follows it, and the next convolution, if nothing else reads any of it."""
    first = _module(node, modules)
    if not isinstance(first, nn.Conv2d) or first.groups != 1 or calls[node.target] != 1:
        return None
    between: list[nn.Module] = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = _module(node, modules)
        if module is not None and calls[node.target] != 1:
            return None
        if isinstance(module, nn.Conv2d):
            return (first, between, module) if module.groups == 1 else None
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            between.append(module)
        elif isinstance(module, nn.ReLU) or node.target in RELUS:
            between.append(nn.ReLU())
        elif not isinstance(module, nn.Identity):
            return None
    return None


def _module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules[str(node.target)] if node.op == "call_module" else None


def _shorten(first: nn.Conv2d, between: list[nn.Module], last: nn.Conv2d) -> int:
    """Take the dead channels out of all of them where that is exact; how many went."""
    constant = first.bias if first.bias is not None else first.weight.new_zeros(first.out_channels)
    for module in between:
        constant = module(constant.view(1, -1, 1, 1)).flatten()
    pads = isinstance(last.padding, str) or any(last.padding)
    keep = ~_dead(first) | ((constant != 0) & pads)
    if keep.all():
        return 0
    if not keep.any():
        keep[0] = True
    gone = int((~keep).sum())
    if (constant[~keep] != 0).any():
        shift = last.weight[:, ~keep].sum((2, 3)) @ constant[~keep]
        last.bias = nn.Parameter(shift if last.bias is None else last.bias + shift)
    for conv, rows in ((first, True), (last, False)):
        conv.weight = nn.Parameter(conv.weight[keep] if rows else conv.weight[:, keep])
    if first.bias is not None:
        first.bias = nn.Parameter(first.bias[keep])
    first.out_channels = last.in_channels = int(keep.sum())
    for norm in between:
        if isinstance(norm, nn.BatchNorm2d):
            _keep_norm(norm, keep)
    return gone


def _keep_norm(norm: nn.BatchNorm2d, keep: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean, norm.running_var = norm.running_mean[keep], norm.running_var[keep]
    if norm.affine:
        norm.weight, norm.bias = nn.Parameter(norm.weight[keep]), nn.Parameter(norm.bias[keep])
    norm.num_features = int(keep.sum())
