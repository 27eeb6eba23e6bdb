"""Where a model is masked: a site is a module, the axis of its channels, and a kind.

    conv         outputs of a convolution, channels in the second dimension
    linear       outputs of a linear layer, channels in the last dimension: hidden units, the units of
                 an MLP, what a block writes to the residual stream
    projection   outputs of an attention's query, key or value layer
    heads        inputs of an attention's output layer, one channel a head
    features     inputs of a linear layer that reads whole maps, laid out flat: a channel at a place
    embedding    outputs of an `nn.Embedding`
    norm         outputs of a batch, group, instance, layer or RMS norm, channels where it has them
    block        outputs of a transformer's encoder block: the residual stream

The published setting is `conv` for convolutional nets and `block` for vision transformers: the authors'
own program masks neither heads nor the units of an MLP there, and sets the selection weight to 0.

A norm is a site of its own because a factor before it is not one behind it: a batch norm's shift stays
when its channel is masked, and a norm over several channels takes part of the factor back.

A factor on the output of a layer is a factor on its weights. One on a residual stream is not: a layer
norm reads what it scales. So there a `ChannelGate` stays behind when masks are folded, as it does where
a layer computes with other weights than the ones it holds (weight norm, pruning, shared weights).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Literal, get_args

from torch import Tensor, nn

from bimask.masking.inserted import Around, put_around

Kind = Literal["conv", "linear", "projection", "heads", "features", "embedding", "norm", "block"]
KINDS: tuple[Kind, ...] = get_args(Kind)
HEADS, FEATURES = "@heads", "@features"  # behind a module's name in a site's key

# Encoder blocks by module and class. Looked up, not imported: a model has them only if somebody did.
BLOCKS = (
    ("torch.nn", "TransformerEncoderLayer"),
    ("torchvision.models.vision_transformer", "EncoderBlock"),
    ("timm.models.vision_transformer", "Block"),
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
CHANNEL_NORMS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm)
LAST_NORMS = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Site:
    """One place that is masked.

    Attributes:
        key: its name among a model's sites: the module's, with `@heads` or `@features` for its inputs.
        module: dotted name of the module.
        channels: factors that it takes.
    """

    key: str
    module: str
    kind: Kind
    channels: int

    @property
    def on_input(self) -> bool:
        """Whether the module's input is scaled, and not its output."""
        return self.kind in ("heads", "features")

    def spread(self, factor: Tensor, width: int) -> Tensor:
        """A factor (..., C) for each of `width` numbers of the axis: one of a head is that of all
        its."""
        if width == self.channels:
            return factor
        return factor.repeat_interleave(width // self.channels, -1)


class ChannelGate(Around):
    """A module with a factor on every channel of its output, or of its input.

    Args:
        block: the module. If it returns a tuple, the first entry is scaled.
        factor: (C,), kept as a buffer.
        axis: where the channels are, see `axis_of`.
        input_factor: (C,) on the last axis of the first input; None leaves it.
    """

    kind = "gate"
    factor: Tensor
    input_factor: Tensor | None

    def __init__(
        self,
        block: nn.Module,
        factor: Tensor,
        *,
        axis: int = -1,
        input_factor: Tensor | None = None,
    ) -> None:
        super().__init__(block)
        self.axis = axis
        self.register_buffer("factor", factor.detach().clone())
        given = None if input_factor is None else input_factor.detach().clone()
        self.register_buffer("input_factor", given)

    def forward(self, first: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[object, ...]:
        """As the module's."""
        if self.input_factor is not None:
            first = first * self.input_factor
        out = self.block(first, *args, **kwargs)
        if isinstance(out, tuple):
            return (times(out[0], self.factor, self.axis), *out[1:])
        return times(out, self.factor, self.axis)


def times(values: Tensor, factor: Tensor, axis: int) -> Tensor:
    """Values times a factor (C,) along their axis 1 or -1."""
    return values * (factor.view(-1, *[1] * (values.ndim - 2)) if axis == 1 else factor)


def axis_of(module: nn.Module) -> int:
    """Where the channels of a module's output are: 1 for convolutions and their norms, else -1."""
    return 1 if isinstance(module, (*CONVOLUTIONS, *CHANNEL_NORMS)) else -1


def sites_of(model: nn.Module) -> dict[str, int]:
    """The published sites, key -> channels: the encoder blocks where there are any, else every
    Conv2d."""
    named = dict(model.named_modules())
    blocks = {name: channels_of(module) for name, module in named.items() if is_block(module)}
    convs = {name: m.out_channels for name, m in named.items() if isinstance(m, nn.Conv2d)}
    return {name: channels for name, channels in (blocks or convs).items() if channels is not None}


def is_block(module: nn.Module) -> bool:
    """Whether this is an encoder block of a transformer, by a class of `BLOCKS`."""
    kinds = (getattr(sys.modules.get(place), name, None) for place, name in BLOCKS)
    return isinstance(module, tuple(kind for kind in kinds if kind is not None))


def channels_of(module: nn.Module | None) -> int | None:
    """Channels of a module's output; None for one that cannot be masked."""
    if isinstance(module, CONVOLUTIONS):
        return module.out_channels
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)):
        return module.num_features
    # a subclass of these may have its channels elsewhere
    if isinstance(module, LAST_NORMS) and type(module) in LAST_NORMS:
        return module.normalized_shape[0] if len(module.normalized_shape) == 1 else None
    if isinstance(module, ChannelGate):
        return len(module.factor)
    if module is not None and is_block(module):
        norm = next((m for m in module.modules() if isinstance(m, nn.LayerNorm)), None)
        return None if norm is None else int(norm.normalized_shape[-1])
    return None


def module_of(key: str) -> str:
    """The module of a site's key."""
    return key.partition("@")[0]


def site_at(model: nn.Module, key: str, channels: int) -> Site | None:
    """The site of this key and size; None where the model has none."""
    name = module_of(key)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    inner = module.block if isinstance(module, ChannelGate) else module
    if key != name:
        fits = isinstance(inner, nn.Linear) and channels and inner.in_features % channels == 0
        on: Kind = "heads" if key.endswith(HEADS) else "features"
        return Site(key, name, on, channels) if fits else None
    return Site(key, name, kind_of(inner), channels) if channels_of(module) == channels else None


def kind_of(module: nn.Module) -> Kind:
    """The kind of a site on the outputs of a module that `channels_of` knows."""
    if isinstance(module, CONVOLUTIONS):
        return "conv"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "norm" if isinstance(module, (*CHANNEL_NORMS, *LAST_NORMS)) else "block"


def foldable(model: nn.Module, sites: Iterable[Site]) -> set[str]:
    """Keys of the sites whose factor can go into their module's own weights, as far as can be seen from
    the modules: none of a block's can, nor computed weights, nor those that several modules share."""
    held = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    found = set()
    for site in sites:
        weight = model.get_submodule(site.module)._parameters.get("weight")
        if site.kind != "block" and weight is not None and held[id(weight)] == 1:
            found.add(site.key)
    return found


def add_gates(model: nn.Module, keys: Iterable[str]) -> None:
    """Put an open `ChannelGate` around the module of each of these sites of `model`, so that it takes
    the weights of a folded model with gates."""
    for key in keys:
        name = module_of(key)
        gate = gate_at(model, name)
        if key != name and gate.input_factor is None:
            layer = gate.block
            assert isinstance(layer, nn.Linear), f"{name} is no linear layer"
            gate.input_factor = gate.factor.new_ones(layer.in_features)


def like(model: nn.Module, name: str) -> Tensor:
    """A tensor of the dtype and device of a module of `model`: of the model, if it has none of its
    own."""
    return next(chain(model.get_submodule(name).parameters(), model.parameters()))


def gate_at(model: nn.Module, name: str) -> ChannelGate:
    """The gate around the module `name`, put there open if there is none."""
    module = model.get_submodule(name)
    if isinstance(module, ChannelGate):
        return module
    channels = channels_of(module)
    assert channels is not None, f"{name} cannot be masked"
    gate = ChannelGate(module, like(model, name).new_ones(channels), axis=axis_of(module))
    put_around(model, name, gate)
    return gate


def gates_in(model: nn.Module) -> list[str]:
    """Keys of the sites of `model` that have a gate: what `add_gates` makes them of."""
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ChannelGate):
            found += [name] if module.input_factor is None else [name, name + FEATURES]
    return found
