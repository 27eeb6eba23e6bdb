"""Triggers that are searched on the suspect before a defence begins, for it to learn against.

The inner problem makes up perturbations of one budget, image by image or in common. What attackers use
is of many kinds and leads to one class. So every class is asked for universal triggers of all families
in `bimask.inspection.class_triggers`, on clean images alone, and images get them at random: towards
every class alike, since not every backdoor makes its class cheap, but the more towards the cheapest
one the further it stands apart from the others, as most backdoors' does. Where leading images anywhere
else is cheaper than to any one class, as all-to-all backdoors make it, such triggers are drawn the
more, too. Of a class's triggers those are drawn most that send images there. A search ends where a
trigger is just strong enough and attackers' are stronger, so images get up to twice as much of it. Not
in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.devices import upload
from bimask.errors import DataError, SettingError
from bimask.inspection.class_triggers import (
    ANY,
    FAMILIES,
    ClassTriggers,
    Family,
    find_class_triggers,
    prepared,
    steps_of,
)
from bimask.inspection.latent import latent_distances
from bimask.inspection.risk import costs

SEARCHES = 3  # of each family towards the cheapest classes, one towards the others
CHEAPEST = 3  # classes
SHARE = 0.3  # of the images that one search sees, so that no two find the same
SEEN = 20  # images that one search sees at most
APART = 0.8  # of the draws go to the cheapest class at most, where the next costs far more
STRONGER = 2.0  # times what a search found, at most, is put on an image; of a warp just that
MOST = 20  # classes, the cheapest ones
PRICED_BY: tuple[Family, ...] = ("patch", "pattern")


@dataclass(frozen=True)
class TriggerPool:
    """Universal triggers of a suspect model.

    Attributes:
        triggers: one a search, each of some of J aims: classes, and `ANY` where it is drawn.
        weights: (J,) how often each aim is drawn, in [0, 1], of sum 1.
        rows: (S, J) which row of a search's triggers is of which aim, -1 where it has none; None
            where every search has all aims in order.
    """

    triggers: tuple[ClassTriggers, ...]
    weights: Tensor
    rows: Tensor | None = None

    @classmethod
    def search(
        cls, suspect: nn.Module, images: Tensor, *, on_step: Callable[[], None] | None = None
    ) -> TriggerPool:
        """The same model and images give the same triggers, whatever the number of images at a bounded
        cost: `SEEN` of them at most for each class and search.

        Args:
            suspect: images in [0, 1] -> logits (N, K), in eval mode; it is left as it is.
            images: (N, C, H, W) in [0, 1], clean, of the suspect's device; two that differ or more.
            on_step: called after each of `TriggerPool.steps(K, N)` steps.

        Raises:
            DataError: fewer than two images.
            SettingError: fewer than two classes.
        """
        if len(images) < 2:
            raise DataError(f"A search of triggers needs two clean images or more, got {len(images)}.")
        net = prepared(suspect, images)
        generator = torch.Generator().manual_seed(0)
        count = _seen(len(images))
        parts = [
            images[torch.randperm(len(images), generator=generator)[:count].to(images.device)]
            for _ in range(SEARCHES)
        ]
        with torch.no_grad():
            classes = net(parts[0][:1]).shape[1]
        if classes < 2:
            raise SettingError(
                "A search of triggers leads images from one class to another, but the model has one "
                "class; set `class_triggers` to 0."
            )
        aims = torch.tensor([*range(classes), ANY])

        def search(part: Tensor, family: Family, which: Tensor) -> ClassTriggers:
            towards = aims[which].to(images.device)
            return find_class_triggers(net, part, family, towards=towards, on_step=on_step)

        every = torch.arange(len(aims))
        priced = {family: search(parts[0], family, every) for family in PRICED_BY}
        prices = torch.stack([found.price.double().cpu() for found in priced.values()])
        distances = latent_distances(suspect, images)
        cost = costs([*prices[:, :-1], *([] if distances is None else [distances])])
        anywhere = apart(prices[:, -1].log().mean(), prices[:, :-1].amin(1).log().mean())
        weights = torch.cat([(1 - anywhere) * draws(cost), anywhere.view(1)])
        towards = weights.nonzero().flatten()
        # what is searched again, as places in `towards`, whose last is ANY if that is drawn at all
        ranked = cost[towards[towards < classes]].argsort()
        near = ranked[:CHEAPEST]
        if anywhere > 0:
            near = torch.cat([ranked[: CHEAPEST - 1], torch.tensor([len(ranked)])])
        near = near.sort().values
        found = [
            priced[family].of(towards.to(images.device))
            if family in priced
            else search(parts[0], family, towards)
            for family in FAMILIES
        ]
        rows = [torch.arange(len(towards))] * len(FAMILIES)
        for part in parts[1:]:
            found += [search(part, family, towards[near]) for family in FAMILIES]
            of_aim = torch.full((len(towards),), -1).index_put((near,), torch.arange(len(near)))
            rows += [of_aim] * len(FAMILIES)
        return cls(tuple(found), weights[towards], torch.stack(rows))

    @staticmethod
    def steps(classes: int, images: int) -> int:
        """How often `on_step` is called."""
        seen, towards = _seen(images), min(classes, MOST)
        first = {family: steps_of(family, towards, seen) for family in FAMILIES}
        first |= {family: steps_of(family, classes + 1, seen) for family in PRICED_BY}
        again = sum(steps_of(family, min(towards, CHEAPEST), seen) for family in FAMILIES)
        return sum(first.values()) + (SEARCHES - 1) * again

    @cached_property
    def _rows(self) -> Tensor:
        every = torch.arange(len(self.weights)).expand(len(self.triggers), -1)
        return every if self.rows is None else self.rows

    @cached_property
    def chances(self) -> Tensor:
        """How often each search's trigger of each aim is drawn: (S, J) of sum 1, by its success."""
        rows = self._rows
        success = torch.stack(
            [
                found.success.double().cpu()[row.clamp_min(0)]
                for found, row in zip(self.triggers, rows, strict=True)
            ]
        )
        success = success.clamp_min(1e-6)  # where none of a class's triggers works, all are drawn alike
        success = success * (rows >= 0)
        return success / success.sum(0) * self.weights.double()

    def to(self, device: torch.device | str) -> TriggerPool:
        """The same on another device."""
        return replace(self, triggers=tuple(found.to(device) for found in self.triggers))

    def on(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """On each image a trigger of its own, drawn, and up to `STRONGER` times as strong as it was
        found: (N, C, H, W) in [0, 1] -> same."""
        drawn = torch.multinomial(
            self.chances.flatten(), len(images), replacement=True, generator=generator
        )
        searches, aims = drawn // len(self.weights), drawn % len(self.weights)
        strengths = 1 + (STRONGER - 1) * torch.rand(len(images), generator=generator)
        triggered = torch.empty_like(images)
        for search in searches.unique().tolist():
            rows = (searches == search).nonzero().flatten()
            mine = upload(rows, images)
            of_aim = upload(self._rows[search, aims[rows]], images)
            found = self.triggers[search].apply_each(images[mine], of_aim)
            if self.triggers[search].family != "warp":
                strength = upload(strengths[rows], images).view(-1, 1, 1, 1).to(images.dtype)
                found = torch.lerp(images[mine], found, strength).clamp(0, 1)
            triggered[mine] = found
        return triggered


def draws(costs: Tensor) -> Tensor:
    """How often each class is drawn: (K,) logs of prices -> (K,) in [0, 1], of sum 1.

    The `MOST` cheapest classes share the draws evenly, but for APART (1 - p_1 / p_2) of them, which
    are the cheapest's alone: p_1 is its price, p_2 that of the next.
    """
    kept = costs.clamp_max(1e3).topk(min(MOST, len(costs)), largest=False)
    more = apart(kept.values[0], kept.values[1])
    share = (1 - more) / len(kept.values) + more * F.one_hot(torch.tensor(0), len(kept.values))
    return torch.zeros_like(costs).index_put((kept.indices,), share)


def apart(cheapest: Tensor, following: Tensor) -> Tensor:
    """How much of the draws an aim has for itself, in [0, APART]: APART (1 - p_1 / p_2), by the logs of
    its price and the next; 0 where it is not the cheapest."""
    return APART * (1 - (cheapest - following).exp()).clamp_min(0)


def _seen(images: int) -> int:
    return min(SEEN, max(1, round(SHARE * images)))
