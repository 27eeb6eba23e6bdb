"""Modules that a defence puts around others, because no weight can hold what they do.

Attributes that an `Around` has not are those of the module that it stands around. A defended model is
saved under the names of its modules; `inserted_in` lists those of `KINDS`, which are not the
architecture's own, and `insert` puts them back before the weights are loaded. A `ChannelGate`
(`bimask.masking.sites`) is an `Around`, too, and `gates_in` lists it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from bimask.errors import ModelError


class Around(nn.Module):
    """A module around another.

    Class attributes:
        kind: its name, in the manifest of a cleaned model.

    Args:
        block: the other.
    """

    kind: ClassVar[str]

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """What this has not is the block's: a model may read the weights of a layer it calls."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "block":
                raise
            found: Tensor | nn.Module = getattr(super().__getattr__("block"), name)
            return found

    def stay_called(self) -> None:
        """Keep others from reading the block's weights in place of calling this: torch's encoder layers
        do so in eval mode, unless there is a hook in them."""
        self.register_forward_hook(_nothing)

    @classmethod
    def like(cls, block: nn.Module, tensors: Mapping[str, Tensor]) -> Self:
        """One around `block` that takes these tensors of its own, by name.

        Raises:
            LookupError: a tensor is missing.
        """
        raise NotImplementedError


class ActivationBound(Around):
    """A module whose output is cut off from above: min(output, bound).

    Args:
        block: the module; it returns a tensor (N, ...).
        bound: of one number of the output, or of a channel: every dimension but that of the images is
            that of the output, or 1. It is kept as a buffer.
    """

    kind = "bound"
    bound: Tensor

    def __init__(self, block: nn.Module, bound: Tensor) -> None:
        super().__init__(block)
        self.register_buffer("bound", bound)
        self.stay_called()

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """As the block's, cut off.

        Raises:
            ModelError: bounds by position, and images of another size than they were learned on.
        """
        out: Tensor = self.block(*args, **kwargs)
        fits = all(b in (1, o) for b, o in zip(self.bound.shape, out.shape[1:], strict=True))
        if not fits:
            raise ModelError(
                f"The bounds of the activations were learned for maps of {_shape(self.bound.shape)}, "
                f"but these images give {_shape(out.shape[1:])}; give images of the size that the "
                "defence had, or defend with `granularity: channel`."
            )
        return torch.minimum(out, self.bound)

    @classmethod
    def like(cls, block: nn.Module, tensors: Mapping[str, Tensor]) -> Self:
        return cls(block, tensors["bound"].clone())


class Polarised(Around):
    """A convolution whose input first goes through a linear map of its channels, place by place.

    Args:
        block: the convolution, of C input channels.
        polariser: (N, C, H, W) -> (N, C, H, W); a convolution of 1x1 in what is saved.
    """

    kind = "polariser"

    def __init__(self, block: nn.Module, polariser: nn.Module) -> None:
        super().__init__(block)
        self.polariser = polariser

    def forward(self, first: Tensor, *args: object, **kwargs: object) -> Tensor:
        """As the block's."""
        out: Tensor = self.block(self.polariser(first), *args, **kwargs)
        return out

    @classmethod
    def like(cls, block: nn.Module, tensors: Mapping[str, Tensor]) -> Self:
        own = next(block.parameters())
        weight, bias = (tensors[f"polariser.{kind}"].to(own) for kind in ("weight", "bias"))
        return cls(block, pointwise(weight, bias))


def pointwise(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A convolution of 1x1 with a copy of this weight (out, in, 1, 1) and bias (out,). No weight is
    drawn for it, so that generators stay where they are."""
    out, channels = weight.shape[:2]
    made = nn.Conv2d(channels, out, 1, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


KINDS: dict[str, type[Around]] = {kind.kind: kind for kind in (ActivationBound, Polarised)}


def put_around(model: nn.Module, name: str, outer: nn.Module) -> None:
    """Put `outer` in the place of the module `name`, which it holds: in all places, where one module is
    used under several names."""
    module = model.get_submodule(name)
    for place, other in list(model.named_modules(remove_duplicate=False)):
        if other is module:
            model.set_submodule(place, outer)


def inserted_in(model: nn.Module) -> dict[str, str]:
    """Names of the modules of `KINDS` in a model, the outer first, and their kinds."""
    known = tuple(KINDS.values())
    return {name: m.kind for name, m in model.named_modules() if isinstance(m, known)}


def insert(model: nn.Module, found: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Put modules around those of a plain model, so that it takes the weights of a defended one.

    Args:
        found: what `inserted_in` said.
        tensors: of the defended model, by name; an inserted module takes its form from its own.

    Raises:
        LookupError: no such kind, or a tensor is missing.
        AttributeError: no such module.
    """
    for name, kind in found.items():
        prefix = f"{name}."
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        put_around(model, name, KINDS[kind].like(model.get_submodule(name), own))


def _nothing(_module: nn.Module, _args: object, _out: object) -> None:
    """A hook."""


def _shape(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))
