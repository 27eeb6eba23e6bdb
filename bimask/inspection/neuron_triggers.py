"""Triggers that drive a candidate neuron up and lead images to its class, and how often they do.

For a neuron j of class t, over clean images x of other classes (ABS, Liu et al., CCS 2019, with the
term of the class from its version for TrojAI), Adam makes small

    - mean of j's map / q  - a log p_t  + b relu(size - most) / most  + 0.01 size

of one of these triggers:

    patch     T(x) = (1 - m) x + m p    size = mean of m; m begins as a square in a corner
    pattern   T(x) = clip(x + d)        size = mean of |d|, so that a pattern may change a picture as
                                        much as a patch of that size

The term of the class is needed: many neurons can be driven up by pictures that do not reach it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.devices import upload
from bimask.inspection.neurons import Neuron
from bimask.masking.copies import copied
from bimask.masking.sites import axis_of

Kind = Literal["patch", "pattern"]
PER_PASS = 2048  # images
SMALL = 0.01  # weight of the size below its bound: the source's for TrojAI


@dataclass(frozen=True)
class Triggers:
    """Triggers of one kind.

    Attributes:
        cover: (J, 1, H, W) in [0, 1], what a patch covers; of a pattern 1.
        paint: (J, C, H, W): in [0, 1] what a patch shows, or what a pattern adds.
        target: (J,) int64, the classes.
    """

    kind: Kind
    cover: Tensor
    paint: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def of(self, rows: Tensor) -> Triggers:
        """Some of them, (I,) places or (J,) booleans."""
        index = rows.to(self.target.device)
        return replace(
            self, cover=self.cover[index], paint=self.paint[index], target=self.target[index]
        )

    def every(self, images: Tensor) -> Tensor:
        """Each on all images: (N, C, H, W) -> (J, N, C, H, W), in [0, 1]."""
        return _put(self.kind, self.cover[:, None], self.paint[:, None], images)

    def each(self, images: Tensor, rows: Tensor, offsets: Tensor | None = None) -> Tensor:
        """On each image one: (N, C, H, W), (N,) places in J -> (N, C, H, W), in [0, 1].

        Args:
            offsets: (N, 2) int64, pixels down and to the right that a trigger is moved by; what leaves
                the picture is lost.
        """
        cover, paint = self.cover[rows], self.paint[rows]
        if offsets is not None:
            cover, paint = moved(cover, offsets), moved(paint, offsets)
            if self.kind == "pattern":
                cover = torch.ones_like(cover)
        return _put(self.kind, cover, paint, images)


def _put(kind: Kind, cover: Tensor, paint: Tensor, images: Tensor) -> Tensor:
    if kind == "pattern":
        return (images + paint).clamp(0, 1)
    return images * (1 - cover) + cover * paint


def moved(maps: Tensor, offsets: Tensor) -> Tensor:
    """Maps (N, C, H, W), each moved by its own offset (N, 2), with zeros where nothing came."""
    n, channels, height, width = maps.shape
    most = max(1, int(offsets.abs().max()))
    padded = F.pad(maps, [most] * 4)
    at = (most - offsets).to(maps.device)
    rows = (at[:, :1] + torch.arange(height, device=maps.device)).view(n, 1, height, 1)
    columns = (at[:, 1:] + torch.arange(width, device=maps.device)).view(n, 1, 1, width)
    picture = torch.arange(n, device=maps.device).view(n, 1, 1, 1)
    channel = torch.arange(channels, device=maps.device).view(1, -1, 1, 1)
    return padded[picture, channel, rows, columns]


class _Learned(nn.Module):
    """The parameters of J triggers."""

    def __init__(
        self, kind: Kind, count: int, shape: torch.Size, most: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.kind = kind
        channels, height, width = shape
        side = max(1, round(math.sqrt(most * height * width)))
        start = torch.full((count, 1, height, width), -2.0)
        start[:, :, :side, :side] = 2.0
        self.mask = nn.Parameter(start)
        noise = torch.randn(count, channels, height, width, generator=generator)
        self.paint = nn.Parameter(noise.clamp(0, 1) if kind == "patch" else 0.01 * noise)

    def cover(self) -> Tensor:
        if self.kind == "pattern":
            return torch.ones_like(self.mask)
        return self.mask.tanh() / 2 + 0.5

    def size(self) -> Tensor:
        shown = self.mask.tanh() / 2 + 0.5 if self.kind == "patch" else self.paint.abs()
        return shown.mean((1, 2, 3))


def size_penalty(size: Tensor, most: float, weight: float) -> Tensor:
    """0 up to the bound, and then weight (size - most) / most."""
    return weight * (size - most).clamp_min(0) / most


def search_triggers(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    neurons: list[Neuron],
    *,
    kind: Kind,
    steps: int,
    lr: float,
    most: float,
    target_weight: float,
    size_weight: float,
    generator: torch.Generator,
) -> tuple[Triggers, int]:
    """A trigger for each neuron, and how many passes forward and back that took.

    Args:
        model: images -> logits (N, K), in eval mode; left as it is.
        images: (N, C, H, W) in [0, 1], clean; labels (N,) int64.
        most: of a trigger's size, a share of the picture in (0, 1].
    """
    net = copied(model).requires_grad_(False)
    parts, passes = [], 0
    per_pass = max(1, PER_PASS // len(images))
    for start in range(0, len(neurons), per_pass):
        own = neurons[start : start + per_pass]
        learned = _Learned(kind, len(own), images.shape[1:], most, generator).to(images)
        target = upload(torch.tensor([neuron.target for neuron in own]), images)
        adam = torch.optim.Adam(learned.parameters(), lr)
        counts = (labels != target[:, None]).to(images)  # (J, N): images of other classes
        counts = counts / counts.sum(1, keepdim=True).clamp_min(1)
        for _ in range(steps):
            shown = _put(kind, learned.cover()[:, None], learned.paint[:, None], images)
            with _Read(net, own, counts.shape) as read:
                logits = net(shown.flatten(0, 1)).unflatten(0, counts.shape)
            gain = read.values() + target_weight * logits.log_softmax(2).gather(
                2, target.view(-1, 1, 1).expand(-1, counts.shape[1], 1)
            ).squeeze(2)
            size = learned.size()
            loss = -(gain * counts).sum(1) + size_penalty(size, most, size_weight) + SMALL * size
            adam.zero_grad()
            loss.sum().backward()
            adam.step()
            if kind == "patch":
                with torch.no_grad():
                    learned.paint.clamp_(0, 1)
        passes += steps
        parts.append(Triggers(kind, learned.cover().detach(), learned.paint.detach().clone(), target))
    together = [torch.cat([getattr(p, name) for p in parts]) for name in ("cover", "paint", "target")]
    return Triggers(kind, *together), passes


class _Read:
    """What neurons answer in the passes while this is open: one of each block of images."""

    def __init__(self, net: nn.Module, neurons: list[Neuron], shape: torch.Size) -> None:
        self.net, self.neurons, self.shape = net, neurons, shape
        self.read: dict[int, Tensor] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> _Read:
        layers: dict[str, list[int]] = {}
        for row, neuron in enumerate(self.neurons):
            layers.setdefault(neuron.site.module, []).append(row)
        for name, rows in layers.items():
            module = self.net.get_submodule(name)
            self.handles.append(module.register_forward_hook(self._hook(rows, axis_of(module))))
        return self

    def _hook(self, rows: list[int], axis: int) -> Any:
        def see(_module: nn.Module, _args: Any, out: Tensor) -> None:
            maps = out.unflatten(0, self.shape)
            for row in rows:
                own = maps[row].select(axis, self.neurons[row].channel)
                self.read[row] = own.flatten(1).mean(1) if own.ndim > 1 else own

        return see

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def values(self) -> Tensor:
        """(J, N): the mean of each map, by the level of its layer."""
        scaled = [self.read[row] / max(neuron.level, 1e-6) for row, neuron in enumerate(self.neurons)]
        return torch.stack(scaled)


@torch.no_grad()
def flip_rates(
    model: nn.Module, triggers: Triggers, images: Tensor, labels: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """How often each trigger leads images to its class: of all images of other classes, (J,), and of
    those of each class, (J, K), 0 where there are none.

    Args:
        images: (N, C, H, W) in [0, 1], clean, and best not those of the search; labels (N,) int64.
    """
    hits = torch.stack(
        [
            torch.cat(
                [
                    model(part).argmax(1) == triggers.target[row]
                    for part in triggers.of(torch.tensor([row])).every(images)[0].split(512)
                ]
            )
            for row in range(len(triggers))
        ]
    )
    of_class = F.one_hot(labels, classes).to(torch.float64)  # (N, K)
    others = (labels != triggers.target[:, None]).double()  # (J, N)
    hit = hits.double() * others
    by_class = (hit @ of_class) / (others @ of_class).clamp_min(1)
    return hit.sum(1) / others.sum(1).clamp_min(1), by_class
