"""Which channels of a suspect, driven far up, lead every image to one class.

The stimulation of ABS (Liu et al., CCS 2019): on clean images, of channel k of a layer l the whole map
is set to

    v_i = i reach q_l / n,   i = 0 .. n - 1,   q_l the 99.9th percentile of l's outputs

and the logits z are read. The elevation of class t on an image is the largest z_t(v_i) - z_t(v_0) of
i >= 1. The image votes for the class of the largest elevation, by what this has over the second. A
channel is a candidate if one class has the votes of nearly all images; its score is the smallest of
these votes among images of other classes.

ABS takes the largest output in place of q_l, which in few images is one outlier, and never asks the
channels that are left over from its batches of eight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bimask.masking.attention import call_projections
from bimask.masking.copies import copied
from bimask.masking.discovery import candidates
from bimask.masking.masks import any_called
from bimask.masking.sites import Site, axis_of

PERCENTILE = 0.999
A_LAYER = 3  # candidates of one layer at most, until half the list is full
PER_PASS = 2048  # images


@dataclass(frozen=True)
class Neuron:
    """A channel that leads images to a class.

    Attributes:
        site: the layer.
        channel: its number there.
        target: the class.
        score: the least by which it does so, in logits.
        level: the 99.9th percentile of the layer's outputs on clean images.
    """

    site: Site
    channel: int
    target: int
    score: float
    level: float


class Stimulator:
    """A suspect whose channels can be set to what one likes.

    Layers before the one in question answer what they did before and are not run again.

    Args:
        model: images -> logits (N, K), in eval mode; left as it is.
        images: (N, C, H, W) in [0, 1], clean.

    Attributes:
        sites: convolutions and hidden linear layers.
        levels: of each site.
        passes: batches that went through the net or a part of it.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.images = images
        self._net = copied(model).requires_grad_(False)
        found = candidates(self._net, images)
        self.sites = [site for site in found if site.kind in ("conv", "linear")]
        if any_called(self._net, self.sites):
            call_projections(self._net)
        self._outputs: dict[str, list[Tensor]] = {}  # in the order of first calls
        self._watch()
        self.passes = 1
        self.levels = {site.key: _percentile(self._outputs[site.module]) for site in self.sites}

    @torch.no_grad()
    def _watch(self) -> None:
        def keep(name: str) -> Any:
            # a clone: code that works in place would change it
            return lambda _module, _args, out: self._outputs.setdefault(name, []).append(out.clone())

        with ExitStack() as undo:
            for site in self.sites:
                module = self._net.get_submodule(site.module)
                undo.callback(module.register_forward_hook(keep(site.module)).remove)
            self._net(self.images)

    def elevations(self, site: Site, reach: float, values: int) -> Tensor:
        """Of every channel, image and class: (channels, N, K)."""
        steps = torch.arange(values) * (reach * self.levels[site.key] / values)
        found = []
        for channels in torch.arange(site.channels).split(
            max(1, PER_PASS // len(self.images) // values)
        ):
            logits = self._stimulated(site, channels, steps).unflatten(0, (len(channels), values))
            found.append((logits[:, 1:] - logits[:, :1]).amax(1))
        return torch.cat(found)

    @torch.no_grad()
    def _stimulated(self, site: Site, channels: Tensor, steps: Tensor) -> Tensor:
        """Logits of every channel with every value: (channels x values, N, K)."""
        blocks, count = len(channels) * len(steps), len(self.images)
        module = self._net.get_submodule(site.module)
        at = channels.repeat_interleave(len(steps)).to(self.images.device)
        value = steps.repeat(len(channels)).to(self.images)
        axis = axis_of(module)

        def put(_module: nn.Module, _args: Any, out: Any) -> Any:
            rows = out.unflatten(0, (blocks, count)).movedim(2 if axis == 1 else -1, 1).clone()
            index = torch.arange(blocks, device=out.device)
            rows[index, at] = value.view(-1, *[1] * (rows.ndim - 2)).expand_as(rows[:, 0])
            return rows.movedim(1, 2 if axis == 1 else -1).flatten(0, 1).contiguous()

        with self._replayed(site, blocks):
            handle = module.register_forward_hook(put)
            try:
                logits: Tensor = self._net(self.images.repeat(blocks, 1, 1, 1))
            finally:
                handle.remove()
        self.passes += 1
        return logits.unflatten(0, (blocks, count))

    @contextmanager
    def _replayed(self, site: Site, blocks: int) -> Iterator[None]:
        """Layers called once, and before the site or the site itself, answer what they did on the
        images."""
        with ExitStack() as undo:
            order = list(self._outputs)
            for name in order[: order.index(site.module) + 1]:
                if len(self._outputs[name]) > 1:
                    continue
                module, (kept,) = self._net.get_submodule(name), self._outputs[name]
                repeated = kept.repeat(blocks, *[1] * (kept.ndim - 1))
                own = module.__dict__.get("forward")
                module.forward = _answering(repeated)
                undo.callback(_give_back, module, own)
            yield


def _answering(value: Tensor) -> Callable[..., Tensor]:
    return lambda *_args, **_kwargs: value


def _give_back(module: nn.Module, own: Any) -> None:
    if own is None:
        del module.forward
    else:
        module.forward = own


def _percentile(outputs: list[Tensor]) -> float:
    values = torch.cat([out.flatten() for out in outputs]).float()
    rank = max(1, int(PERCENTILE * len(values) + 0.5))
    return float(values.kthvalue(rank).values.item())


def find_neurons(
    stimulator: Stimulator,
    labels: Tensor,
    *,
    reach: float = 2.0,
    values: int = 4,
    unanimity: float = 0.9,
    most: int = 20,
) -> list[Neuron]:
    """The candidates, the best first.

    Args:
        labels: (N,) classes of the stimulator's images.
        reach: times the percentile that the values go up to.
        values: how many, from 0.
        unanimity: share of the images that votes for one class, at least.
        most: candidates at most.
    """
    found = []
    for site in stimulator.sites:
        elevations = stimulator.elevations(site, reach, values)
        level = stimulator.levels[site.key]
        for channel, one in enumerate(elevations):
            vote = candidate(one, labels, unanimity)
            if vote is not None:
                found.append(Neuron(site, channel, *vote, level))
    return spread(found, most)


def candidate(elevations: Tensor, labels: Tensor, unanimity: float) -> tuple[int, float] | None:
    """The class that a channel leads to, and its score; None where images disagree, where it leads
    nowhere, or where all images are of that class.

    Args:
        elevations: (N, K), K >= 2.
    """
    top = elevations.topk(2, 1)
    votes = top.indices[:, 0]
    target = int(votes.mode().values)
    mine = votes == target
    if mine.double().mean().item() < unanimity:
        return None
    counts = mine & (labels.to(votes) != target)
    if not counts.any():
        return None
    score = float((top.values[:, 0] - top.values[:, 1])[counts].min())
    return (target, score) if score > 0 else None


def spread(found: list[Neuron], most: int) -> list[Neuron]:
    """The best `most`, of which the first half has three of a layer at most."""
    ranked = sorted(found, key=lambda neuron: -neuron.score)
    chosen: list[Neuron] = []
    for neuron in ranked:
        if len(chosen) >= (most + 1) // 2:
            break
        if sum(other.site == neuron.site for other in chosen) < A_LAYER:
            chosen.append(neuron)
    rest = [neuron for neuron in ranked if neuron not in chosen]
    return sorted([*chosen, *rest][:most], key=lambda neuron: -neuron.score)
