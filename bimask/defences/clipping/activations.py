"""Where the activations of a net can be cut off, and how large they are on clean images.

One forward pass shows them. For every call of an activation function there is, in this order:

    a module, called once, whose output is that of the function: the activation's own, or the block
    that ends with it;
    a module, called once, whose output is the function's input: for b >= 0,
    min(relu(v), b) = relu(min(v, b)), so that cutting off before is cutting off behind.

So an `nn.ReLU` that a net calls several times has a place for every call, with bounds of its own. Maps
that a net pools behind its last activation, as pre-activation nets do, are cut off as they are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bimask.masking.copies import copied
from bimask.masking.inserted import Around, put_around
from bimask.masking.sites import CHANNEL_NORMS, CONVOLUTIONS, LAST_NORMS

Granularity = Literal["channel", "position"]
FUNCTIONS = frozenset(
    {
        *("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "rrelu"),
        *("gelu", "silu", "silu_", "elu", "elu_", "celu", "selu", "mish", "hardswish", "softplus"),
        *("prelu", "_prelu_kernel", "threshold", "threshold_"),
    }
)
POOLINGS = frozenset({"avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"})


@dataclass(frozen=True)
class Place:
    """Where activations are cut off.

    Attributes:
        module: whose output is cut off.
        axis: of the channels in that output, 1 or -1.
        before: whether the activation function comes behind it, so that what is below 0 counts as 0.
    """

    module: str
    axis: int
    before: bool


class _Watch(TorchFunctionMode):
    """Which modules' outputs functions are given and answer, by one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []  # alive, so that no other tensor gets the address
        self.made: dict[tuple[int, int], list[str]] = {}
        self.calls: Counter[str] = Counter()
        # of every call: the value (N, ...), what made it, and what its result is known as
        self.activated: list[tuple[Tensor, list[str], tuple[int, int]]] = []
        self.pooled: list[tuple[Tensor, list[str]]] = []  # behind the last activation

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        value = args[0] if args else None
        pools = name in POOLINGS or (name == "mean" and _over_places(args[1:], kwargs or {}))
        makers = list(self.made.get(_key(value), [])) if isinstance(value, Tensor) else []
        out = func(*args, **(kwargs or {}))
        if isinstance(value, Tensor) and isinstance(out, Tensor):
            if name in FUNCTIONS:
                self.kept.append(out)
                self.activated.append((value, makers, _key(out)))
                self.pooled = []
            elif pools and value.ndim == 4:
                self.pooled = [(value, makers)]
        return out

    def hook(self, name: str) -> Any:
        def seen(_module: nn.Module, _args: Any, out: Any) -> None:
            self.calls[name] += 1
            if isinstance(out, Tensor):
                self.kept.append(out)
                self.made.setdefault(_key(out), []).append(name)

        return seen


def _over_places(args: Any, kwargs: Any) -> bool:
    """Whether a mean is one over the places of maps."""
    over = args[0] if args else kwargs.get("dim")
    return isinstance(over, (tuple, list)) and {d % 4 for d in over} == {2, 3}


def _key(value: Tensor) -> tuple[int, int]:
    """A tensor as it is now: code that works in place leaves the object and changes what it holds."""
    return id(value), value._version


@torch.no_grad()
def places_in(model: nn.Module, images: Tensor) -> list[Place]:
    """The places of a model, in the order in which its activations are called.

    Args:
        model: images -> logits, in eval mode; left as it is.
        images: (N, C, H, W), N >= 1, of the model's dtype and device.
    """
    watch = _Watch()
    handles = [
        module.register_forward_hook(watch.hook(name)) for name, module in model.named_modules() if name
    ]
    asked = images.repeat(3, 1, 1, 1)[:3]  # three, so that no other dimension is taken for theirs
    try:
        with watch:
            model(asked)
    finally:
        for handle in handles:
            handle.remove()
    modules = dict(model.named_modules())
    found: dict[str, Place] = {}

    def add(value: Tensor, makers: list[str], names: list[str], *, before: bool) -> bool:
        once = [name for name in names if watch.calls[name] == 1]
        if value.shape[0] == len(asked) and once:
            axis = _axis(value, [modules[name] for name in makers])
            found.setdefault(once[0], Place(once[0], axis, before))
        return bool(once)

    results = {result for _, _, result in watch.activated}
    for value, makers, result in watch.activated:
        behind = [name for name in watch.made.get(result, []) if name not in makers]
        if not add(value, makers, behind, before=False):
            add(value, makers, makers, before=True)
    for value, makers in watch.pooled:
        if _key(value) not in results:
            add(value, makers, makers, before=False)
    places = list(found.values())
    return [place for place, meter in metered(model, places, asked) if meter.count]


def _axis(value: Tensor, makers: list[nn.Module]) -> int:
    """Where the channels are: as what made the value has them, else where images have them."""
    for module in makers:
        if isinstance(module, (*CONVOLUTIONS, *CHANNEL_NORMS)):
            return 1
        if isinstance(module, (nn.Linear, *LAST_NORMS)):
            return -1
    return 1 if value.ndim == 4 else -1


class Meter(Around):
    """The mean and the standard deviation of what a module answers, over passes.

    Attributes:
        count: numbers seen of each channel or position.
    """

    kind = "meter"

    def __init__(self, block: nn.Module, place: Place, granularity: Granularity) -> None:
        super().__init__(block)
        self.place, self.granularity, self.count = place, granularity, 0
        self.sum: Tensor | None = None  # float64
        self.squares: Tensor | None = None
        self.stay_called()

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """As the block's."""
        out: Tensor = self.block(*args, **kwargs)
        values = (out.clamp_min(0) if self.place.before else out).detach().cpu().double()
        over = [0] if self.granularity == "position" else _but_channels(values, self.place.axis)
        parts = [part.sum(over, keepdim=True)[0] for part in (values, values.square())]
        self.count += values.numel() // parts[0].numel()
        if self.sum is None or self.squares is None:
            self.sum, self.squares = parts
        else:
            self.sum, self.squares = self.sum + parts[0], self.squares + parts[1]
        return out

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased standard deviation of what was seen: (C, 1, 1), (F,) or, by position, the
        shape of an output; float64 on the CPU."""
        assert self.sum is not None
        assert self.squares is not None
        mean = self.sum / self.count
        variance = (self.squares - self.count * mean.square()) / max(1, self.count - 1)
        return mean, variance.clamp_min(0).sqrt()


def _but_channels(values: Tensor, axis: int) -> list[int]:
    return [d for d in range(values.ndim) if d != axis % values.ndim]


@torch.no_grad()
def metered(
    model: nn.Module,
    places: list[Place],
    images: Tensor,
    granularity: Granularity = "channel",
    batch_size: int = 512,
) -> list[tuple[Place, Meter]]:
    """Every place with what was measured there on the images, batch after batch.

    Args:
        model: images -> logits, in eval mode; left as it is.
        images: (N, C, H, W), of the model's dtype and device.
    """
    net = copied(model)
    meters: dict[Place, Meter] = {}
    for place in innermost_first(places):
        meters[place] = Meter(net.get_submodule(place.module), place, granularity)
        put_around(net, place.module, meters[place])
    for part in images.split(batch_size):
        net(part)
    return [(place, meters[place]) for place in places]


def innermost_first(places: list[Place]) -> list[Place]:
    """In such an order a module keeps its name until something is put around it."""
    return sorted(places, key=lambda place: -place.module.count("."))
