"""What ONP-like pruning sees of a net: its convolutions, which channels go together, and their graphs.

A node is a channel of a convolution, or, where several convolutions write to one residual stream, the
channel of that number of all of them. Its graph is the layer's: with the strengths

    S[i, j] = sum of |W[i, j]| over the kernel

filters i and k are joined where the cosine of S[i] and S[k] is above the q-quantile of the layer's
cosines. The quantile is ours: strengths are not negative, so that an absolute threshold would mean
another density in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bimask.defences.pruning.clp import channel_lipschitz
from bimask.defences.pruning.layers import BatchNorm, pairs
from bimask.masking.discovery import candidates
from bimask.masking.sites import foldable

ADDS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "__sub__"})
MULTIPLIES = frozenset({"mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "__truediv__"})
# what comes out of these has other channels than what goes in
MIXES = frozenset(
    {
        *("cat", "concat", "concatenate", "flatten", "view", "reshape", "permute", "transpose"),
        *("matmul", "bmm", "einsum", "linear", "roll", "conv2d", "conv_transpose2d", "pixel_shuffle"),
    }
)


@dataclass(frozen=True)
class Structure:
    """The convolutions of a net that may be pruned.

    Attributes:
        names: in the order of their first calls.
        modules: by name.
        groups: indices into `names` of those that write to one stream.
        readers: by name, convolutions that are given its channels as they are, through norms,
            activations and sums.
        nodes: (C,) int64, of every channel of every convolution in order, its node.
        layers: of every group, its nodes, as places in `nodes` count them.
    """

    names: tuple[str, ...]
    modules: dict[str, nn.Conv2d]
    groups: tuple[tuple[int, ...], ...]
    readers: dict[str, tuple[str, ...]]
    nodes: Tensor
    layers: tuple[slice, ...]

    @property
    def count(self) -> int:
        """Nodes."""
        return self.layers[-1].stop

    def sizes(self) -> dict[str, int]:
        """Channels by name."""
        return {name: self.modules[name].out_channels for name in self.names}

    def keeps(self, pruned: Tensor) -> Tensor:
        """(..., nodes) booleans -> (..., C) factors: 0 where a channel's node is pruned, else 1."""
        return (~pruned[..., self.nodes]).float()

    def tensors(self, pruned: Tensor) -> dict[str, Tensor]:
        """The weights and biases of convolutions with a pruned channel, zeros there."""
        found: dict[str, Tensor] = {}
        parts = self.keeps(pruned).split(list(self.sizes().values()))
        for name, keep in zip(self.names, parts, strict=True):
            module = self.modules[name]
            if not keep.all():
                own = keep.to(module.weight)
                found[f"{name}.weight"] = module.weight.detach() * own.view(-1, 1, 1, 1)
                if module.bias is not None:
                    found[f"{name}.bias"] = module.bias.detach() * own
        return found


class _Streams(TorchFunctionMode):
    """Which convolutions wrote the channels of each tensor, in one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []  # alive, so that no other tensor gets the address
        self.writers: dict[int, frozenset[str]] = {}
        self.joined: list[frozenset[str]] = []
        self.readers: dict[str, list[str]] = {}

    def of(self, value: Any) -> frozenset[str]:
        known = isinstance(value, Tensor) and value.ndim == 4
        return self.writers.get(id(value), frozenset()) if known else frozenset()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = [self.of(value) for value in args[:2]]
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if not isinstance(out, Tensor) or out.ndim != 4 or name in MIXES:
            return out
        written = before[0] if before else frozenset()
        if len(before) == 2 and name in ADDS and all(before):
            written = before[0] | before[1]
            self.joined.append(written)
        elif len(before) == 2 and name in MULTIPLIES:
            larger = max((a for a in args[:2] if isinstance(a, Tensor)), key=Tensor.numel)
            written = self.of(larger)
        if written and out.shape[1] == args[0].shape[1]:
            self.write(out, written)
        return out

    def write(self, out: Tensor, writers: frozenset[str]) -> None:
        self.kept.append(out)
        self.writers[id(out)] = writers


@torch.no_grad()
def structure_of(net: nn.Module, images: Tensor) -> Structure | None:
    """The convolutions of a net; None where it has none that can be pruned.

    Args:
        net: images -> logits, in eval mode; left as it is.
        images: (N, C, H, W), N >= 1.
    """
    found = [site for site in candidates(net, images) if site.kind == "conv"]
    folds = foldable(net, found)
    modules: dict[str, nn.Conv2d] = {}
    for site in found:
        module = net.get_submodule(site.module)
        if site.key in folds and isinstance(module, nn.Conv2d):
            modules[site.module] = module
    if not modules:
        return None
    streams = _watched(net, images[:1], modules)
    names = tuple(modules)
    groups = _joined(names, [joined & modules.keys() for joined in streams.joined], modules)
    nodes: dict[str, Tensor] = {}
    layers, start = [], 0
    for group in groups:
        width = modules[names[group[0]]].out_channels
        layers.append(slice(start, start + width))
        for index in group:
            nodes[names[index]] = torch.arange(start, start + width)
        start += width
    return Structure(
        names,
        modules,
        groups,
        {name: tuple(dict.fromkeys(readers)) for name, readers in streams.readers.items()},
        torch.cat([nodes[name] for name in names]),
        tuple(layers),
    )


def _watched(net: nn.Module, images: Tensor, modules: dict[str, nn.Conv2d]) -> _Streams:
    streams = _Streams()

    def called(name: str) -> Any:
        def see(_module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            for writer in streams.of(args[0]):
                streams.readers.setdefault(writer, []).append(name)
            streams.write(out, frozenset({name}))

        return see

    handles = [module.register_forward_hook(called(name)) for name, module in modules.items()]
    try:
        with streams:
            net(images)
    finally:
        for handle in handles:
            handle.remove()
    return streams


def _joined(
    names: Sequence[str], joined: Sequence[frozenset[str]], modules: dict[str, nn.Conv2d]
) -> tuple[tuple[int, ...], ...]:
    """The groups of those that are joined, directly or through others; of one width each."""
    group = {name: {name} for name in names}
    for members in joined:
        widths = {modules[name].out_channels for name in members}
        if len(widths) == 1:
            whole = set().union(*(group[name] for name in members))
            for name in whole:
                group[name] = whole
    found = dict.fromkeys(tuple(sorted(names.index(n) for n in group[name])) for name in names)
    return tuple(found)


def strengths(weight: Tensor) -> Tensor:
    """S: (out, in, height, width) -> (out, in), >= 0."""
    return weight.detach().abs().sum((2, 3))


def edges(strength: Tensor, quantile: float) -> Tensor:
    """Which filters are joined: (C, in) -> (C, C) booleans, symmetric, none with itself.

    Where a filter has one input, all cosines are 1 and say nothing: none is joined.
    """
    count, inputs = strength.shape
    joined = torch.zeros(count, count, dtype=torch.bool)
    if inputs == 1 or count < 2:
        return joined
    rows = strength.double().cpu()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosines = rows @ rows.T
    others = ~torch.eye(count, dtype=torch.bool)
    joined = (cosines > torch.quantile(cosines[others], quantile)) & others
    return joined | joined.T


def normalised(joined: Tensor) -> Tensor:
    """D^-1/2 (A + I) D^-1/2: (C, C) booleans -> float32."""
    own = joined.float() + torch.eye(len(joined))
    scale = own.sum(1).rsqrt()
    return scale[:, None] * own * scale


@dataclass(frozen=True)
class Graph:
    """The graph of a group.

    Attributes:
        adjacency: (C, C), see `normalised`.
        features: (C, F), each standardised over the group but the depth.
        lipschitz: (C,) of CLP, standardised over the group.
    """

    adjacency: Tensor
    features: Tensor
    lipschitz: Tensor


def graphs_of(
    net: nn.Module, structure: Structure, images: Tensor, *, quantile: float, extended: bool
) -> list[Graph]:
    """Of every group; that of several convolutions joins what one of them does, and has the mean of
    their features.

    Args:
        images: (N, C, H, W), clean.
        extended: whether nodes say more than how strong they read and are read.
    """
    norms = {conv: norm for norm, conv in pairs(net, images[:1]).items()}
    activations = dict(_activations(net, structure, norms, images))
    found = []
    for index, group in enumerate(structure.groups):
        joined, features, bounds = None, [], []
        for member in group:
            name = structure.names[member]
            convolution = structure.modules[name]
            strength = strengths(convolution.weight)
            own = edges(strength, quantile)
            joined = own if joined is None else joined | own
            norm = net.get_submodule(norms[name]) if name in norms else None
            bound, scale = _lipschitz(convolution, norm)
            bounds.append(bound)
            columns = [strength.mean(1), _read(structure, name)]
            if extended:
                columns += [bound, scale, *activations[name]]
            features.append(torch.stack([column.cpu().float() for column in columns], 1))
        assert joined is not None
        together = _standard(torch.stack(features).mean(0))
        if extended:
            depth = torch.full((len(together), 1), index / max(1, len(structure.groups) - 1))
            together = torch.cat([together, depth], 1)
        lipschitz = _standard(torch.stack(bounds).mean(0)[:, None].float())[:, 0]
        found.append(Graph(normalised(joined), together, lipschitz))
    return found


def _standard(columns: Tensor) -> Tensor:
    """Each column with mean 0 and deviation 1 over the rows; 0 where all are equal."""
    spread = columns.std(0, correction=0)
    return (columns - columns.mean(0)) / torch.where(spread > 1e-12, spread, torch.ones_like(spread))


def _read(structure: Structure, name: str) -> Tensor:
    """How strong each channel is read by the convolutions that follow, in the mean; 0 by none."""
    width = structure.modules[name].out_channels
    following = [structure.modules[reader] for reader in structure.readers.get(name, ())]
    read = [
        strengths(module.weight).mean(0)
        for module in following
        if module.groups == 1 and module.in_channels == width
    ]
    return torch.stack(read).mean(0) if read else torch.zeros(width)


def _lipschitz(convolution: nn.Conv2d, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """CLP's bound of every channel, and the scale of the batch norm in it, 1 without one."""
    if norm is not None:
        assert isinstance(norm, BatchNorm)
        assert norm.running_var is not None
        scale = norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()
        return channel_lipschitz(convolution, norm), scale
    bound = torch.linalg.matrix_norm(convolution.weight.detach().cpu().double().flatten(2), ord=2)
    return bound, torch.ones(len(bound))


@torch.no_grad()
def _activations(
    net: nn.Module, structure: Structure, norms: dict[str, str], images: Tensor
) -> Iterator[tuple[str, list[Tensor]]]:
    """Mean, deviation and share of zeros of each convolution's channels behind its norm and a ReLU."""
    kept: dict[str, list[Tensor]] = {}

    def see(name: str) -> Any:
        return lambda _m, _a, out: kept.setdefault(name, []).append(out.clamp_min(0).cpu())

    handles = [
        net.get_submodule(norms.get(name, name)).register_forward_hook(see(name))
        for name in structure.names
    ]
    try:
        for part in images.split(128):
            net(part)
    finally:
        for handle in handles:
            handle.remove()
    for name, parts in kept.items():
        values = torch.cat(parts).transpose(0, 1).flatten(1).double()
        yield name, [values.mean(1), values.std(1), (values == 0).double().mean(1)]
