"""The parts of strategic retraining: its images, its search of Trojan neurons, its batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bimask.data import augment
from bimask.defences.base import CleanData
from bimask.defences.held_out import split
from bimask.defences.loop import Loop, shuffled
from bimask.defences.unlearning.strategic_settings import StrategicConfig
from bimask.devices import upload
from bimask.inspection.class_triggers import Patch, find_class_triggers
from bimask.inspection.neuron_triggers import Kind, Triggers, flip_rates, search_triggers
from bimask.inspection.neurons import Stimulator, find_neurons

HELD_OUT = 0.2  # of the images, to choose by
DRIVEN_ON = 30  # images that neurons are driven up on, at most
SEARCHED_ON = 20  # images that triggers are searched on, at most
LENIENT = 1.2  # times the bound, a trigger's size may be in the end


class Found(nn.Module):
    """The Trojan neurons' triggers of this round and of the first, and the classes they affect."""

    affected: Tensor
    kept: Tensor  # whether an epoch of this round was within the budget
    score: Tensor

    def __init__(self, kind: Kind, most: int, shape: torch.Size, classes: int) -> None:
        super().__init__()
        self.kind = kind
        for when in ("now", "first"):
            self.register_buffer(f"cover_{when}", torch.zeros(most, 1, *shape[1:]))
            self.register_buffer(f"paint_{when}", torch.zeros(most, *shape))
            self.register_buffer(f"target_{when}", torch.full((most,), -1))  # -1: no such neuron
        self.register_buffer("affected", torch.zeros(classes, dtype=torch.bool))
        self.register_buffer("kept", torch.zeros((), dtype=torch.bool))
        self.register_buffer("score", torch.tensor(torch.inf, dtype=torch.float64))

    def put(self, when: str, triggers: Triggers) -> None:
        for name in ("cover", "paint", "target"):
            own = self.get_buffer(f"{name}_{when}")
            own.fill_(-1 if name == "target" else 0)
            own[: len(triggers)] = getattr(triggers, name)

    def remember(self) -> None:
        """This round is the first."""
        self.put("first", self.triggers("now"))

    def triggers(self, when: str) -> Triggers:
        names = [f"{name}_{when}" for name in ("cover", "paint", "target")]
        parts = [self.get_buffer(name) for name in names]
        return Triggers(self.kind, *parts).of(parts[2] >= 0)


@dataclass(frozen=True)
class Parts:
    """The images by what they are for.

    Attributes:
        learn: to retrain on; choose: held out from them, to choose by.
        driven: of `learn`, that neurons are driven up on.
        searched: of `learn`, that triggers are searched on; unseen: all but these.
    """

    learn: CleanData
    choose: CleanData
    driven: CleanData
    searched: CleanData
    unseen: CleanData


def parted(clean: CleanData, generator: torch.Generator) -> Parts:
    """Draw the parts; every class is in `learn` and in `choose`."""
    learn, choose = split(clean, HELD_OUT, generator)
    assert learn.labels is not None
    assert choose.labels is not None
    order = torch.randperm(len(learn.images), generator=generator)
    # one of each class in turn, so that few images are of many classes
    labels = learn.labels.cpu()[order]
    turn = torch.zeros(len(labels), dtype=torch.long)
    for label in labels.unique():
        own = labels == label
        turn[own] = torch.arange(int(own.sum()))
    order = order[turn.argsort(stable=True)]
    count = min(SEARCHED_ON, max(1, len(order) // 2))
    rest = _some(learn, order[count:])
    unseen = CleanData(
        torch.cat([choose.images, rest.images]), torch.cat([choose.labels, _labels(rest)])
    )
    return Parts(learn, choose, _some(learn, order[:DRIVEN_ON]), _some(learn, order[:count]), unseen)


def _some(clean: CleanData, rows: Tensor) -> CleanData:
    index = upload(rows, clean.images)
    return CleanData(clean.images[index], _labels(clean)[index])


def _labels(clean: CleanData) -> Tensor:
    assert clean.labels is not None
    return clean.labels


def mixed(
    learn: CleanData, found: Found, config: StrategicConfig, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once, in batches to which stamped ones of the affected classes are added, each with
    its true label and a trigger drawn among this round's."""
    triggers = found.triggers("now")
    labels = _labels(learn)
    stampable = found.affected[labels].cpu().nonzero().flatten()
    for rows in shuffled(len(labels), config.clean_batch, generator):
        count = max(1, round(len(rows) * config.stamped_share / (1 - config.stamped_share)))
        drawn = stampable
        if len(stampable):
            drawn = stampable[torch.randint(len(stampable), (count,), generator=generator)]
        both = upload(torch.cat([rows, drawn]), learn.images)
        images = augment(learn.images[both], shift=config.shift, flip=config.flip, generator=generator)
        which = torch.randint(len(triggers), (len(drawn),), generator=generator)
        by = torch.randint(-config.jitter, config.jitter + 1, (len(drawn), 2), generator=generator)
        stamped = triggers.each(images[len(rows) :], upload(which, images), by)
        yield torch.cat([images[: len(rows)], stamped]), labels[both]


def search(
    net: nn.Module,
    parts: Parts,
    config: StrategicConfig,
    found: Found,
    generator: torch.Generator,
    loop: Loop[StrategicConfig],
) -> float:
    """Put the Trojan neurons' triggers into `found`, the most successful first; the share of images
    that resist the best candidate's, 1 where there is no candidate."""
    triggers = _candidates(net, parts, config, generator, loop)
    if triggers is None:
        found.put("now", found.triggers("now").of(torch.zeros(0, dtype=torch.long)))
        return 1.0
    rates, by_class = rates_of(net, triggers, parts.unseen, len(found.affected))
    loop.passes.add(forward=len(triggers), backward=0)
    sizes = (triggers.cover > 0.5).float() if triggers.kind == "patch" else triggers.paint.abs()
    small = sizes.mean((1, 2, 3)) <= LENIENT * config.max_size
    order = rates.argsort(descending=True, stable=True)
    order = order[((rates >= config.min_success) & small)[order]]
    found.put("now", triggers.of(order))
    if len(order):
        found.affected.copy_(affected(by_class[order].mean(0), config.top_p, config.top_p_rule))
    return 1 - float(rates.max())


def rates_of(net: nn.Module, triggers: Triggers, on: CleanData, classes: int) -> tuple[Tensor, Tensor]:
    """See `flip_rates`."""
    return flip_rates(net, triggers, on.images, _labels(on), classes)


def affected(rates: Tensor, top_p: float, rule: str) -> Tensor:
    """The classes whose images are stamped: (K,) mean flip rates -> (K,) booleans, one at least.

    Args:
        rule: "rates": the fewest classes that have the share `top_p` of the sum; "classes": the first
            of that share of the classes.
    """
    order = rates.argsort(descending=True, stable=True)
    if rule == "classes":
        count = max(1, round(top_p * len(rates)))
    else:
        sums = rates[order].cumsum(0)
        count = 1 + int((sums < top_p * sums[-1] - 1e-9).sum())
    return torch.zeros_like(rates, dtype=torch.bool).index_fill(0, order[:count], True)


def _candidates(
    net: nn.Module,
    parts: Parts,
    config: StrategicConfig,
    generator: torch.Generator,
    loop: Loop[StrategicConfig],
) -> Triggers | None:
    """A trigger for each candidate; None where there is none."""
    if config.candidates == "classes":
        made = find_class_triggers(net, parts.searched.images, "patch")
        assert isinstance(made.made, Patch)
        loop.passes.add(forward=Patch.steps, backward=Patch.steps)
        cover, paint = (t.detach()[:, 0].sigmoid() for t in (made.made.cover, made.made.paint))
        target = torch.arange(len(cover), device=cover.device)
        return Triggers("patch", cover, paint, target)
    stimulator = Stimulator(net, parts.driven.images)
    neurons = find_neurons(
        stimulator,
        _labels(parts.driven),
        reach=config.reach,
        values=config.values,
        unanimity=config.unanimity,
        most=config.top_k,
    )
    loop.passes.add(forward=stimulator.passes, backward=0)
    if not neurons:
        return None
    triggers, passes = search_triggers(
        net,
        parts.searched.images,
        _labels(parts.searched),
        neurons,
        kind=config.kind,
        steps=config.trigger_steps,
        lr=config.trigger_lr,
        most=config.max_size,
        target_weight=config.target_weight,
        size_weight=config.size_weight,
        generator=generator,
    )
    loop.passes.add(forward=passes, backward=passes)
    return triggers
