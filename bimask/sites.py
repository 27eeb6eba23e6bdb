"""Where a model can be masked: modules whose output has channels.

Convolutions, as published, with channels in the second dimension. In a vision transformer the encoder
blocks instead, whose output (the residual stream) has its channels in the last one: one mask of the
length of a token for each block, as in the authors' own program for transformers, which masks neither
heads nor the units of an MLP, and sets the selection weight to 0.

A factor on a convolution's output is a factor on its weights. One on a residual stream is not: a layer
norm reads what it scales. So there a `ChannelGate` stays behind when masks are folded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import Tensor, nn

# Encoder blocks by module and class. Looked up, not imported: a model has them only if somebody did.
BLOCKS = (
    ("torch.nn", "TransformerEncoderLayer"),
    ("torchvision.models.vision_transformer", "EncoderBlock"),
    ("timm.models.vision_transformer", "Block"),
)


class ChannelGate(nn.Module):
    """An encoder block with a factor on every channel of its output.

    Args:
        block: (N, S, C) -> (N, S, C).
        factor: (C,), kept as a buffer.
    """

    factor: Tensor

    def __init__(self, block: nn.Module, factor: Tensor) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("factor", factor.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, S, C) -> (N, S, C)."""
        out: Tensor = self.block(tokens)
        return out * self.factor


def sites_of(model: nn.Module) -> dict[str, int]:
    """Dotted module name -> channels: the encoder blocks where there are any, else every Conv2d."""
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
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    if isinstance(module, ChannelGate):
        return len(module.factor)
    if module is not None and is_block(module):
        norm = next((m for m in module.modules() if isinstance(m, nn.LayerNorm)), None)
        return None if norm is None else int(norm.normalized_shape[-1])
    return None


def add_gates(model: nn.Module, sites: Iterable[str]) -> None:
    """Put an open `ChannelGate` around each of these encoder blocks of `model`, so that it takes the
    weights of a folded transformer."""
    for site in sites:
        block = model.get_submodule(site)
        channels = channels_of(block)
        assert channels is not None, f"{site} is no encoder block"
        model.set_submodule(site, ChannelGate(block, next(block.parameters()).new_ones(channels)))


def along_channels(factor: Tensor, module: nn.Module) -> Tensor:
    """A factor (..., C) in a shape that multiplies the output of `module`."""
    return factor.view(*factor.shape, 1, 1) if isinstance(module, nn.Conv2d) else factor
