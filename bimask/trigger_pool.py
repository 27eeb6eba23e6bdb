"""Triggers that are searched on the suspect before a defence begins, for it to learn against.

The inner problem makes up perturbations of one budget, image by image or in common. What attackers use
is of many kinds and leads to one class. So every class is asked for universal triggers of all families
in `bimask.class_triggers`, on clean images alone, and images get them at random: a quarter of them
towards the classes that are cheap to reach (`bimask.evidence.suspicion`), where most backdoors lead,
the others towards any class, since not every backdoor makes its class cheap. Of a class's triggers
those are drawn most that send images there. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from bimask.class_triggers import FAMILIES, ClassTriggers, Family, find_class_triggers, steps_of
from bimask.devices import upload
from bimask.errors import DataError
from bimask.evidence import suspicion
from bimask.latent import latent_distances

SEARCHES = 3  # of each family towards each class
SHARE = 0.3  # of the images that one search sees, so that no two find the same
EVEN = 0.75  # of the images get a trigger whatever its class costs
MOST = 20  # classes, the most suspicious ones
PRICED_BY: tuple[Family, ...] = ("patch", "pattern")


@dataclass(frozen=True)
class TriggerPool:
    """Universal triggers of a suspect model.

    Attributes:
        triggers: one a search, of the same J classes each.
        weights: (J,) how often each class is drawn, in [0, 1], of sum 1.
    """

    triggers: tuple[ClassTriggers, ...]
    weights: Tensor

    @classmethod
    def search(
        cls, suspect: nn.Module, images: Tensor, *, on_step: Callable[[], None] | None = None
    ) -> TriggerPool:
        """The same model and images give the same triggers.

        Args:
            suspect: images in [0, 1] -> logits (N, K), in eval mode; it is left as it is.
            images: (N, C, H, W) in [0, 1], clean, of the suspect's device; two that differ or more.
            on_step: called after each of `TriggerPool.steps(K, N)` steps.

        Raises:
            DataError: fewer than two images.
            SettingError: the suspect's last layer is no nn.Linear.
        """
        if len(images) < 2:
            raise DataError(f"A search of triggers needs two clean images or more, got {len(images)}.")
        generator = torch.Generator().manual_seed(0)
        count = _seen(len(images))
        parts = [
            images[torch.randperm(len(images), generator=generator)[:count].to(images.device)]
            for _ in range(SEARCHES)
        ]
        priced = {
            family: find_class_triggers(suspect, parts[0], family, on_step=on_step)
            for family in PRICED_BY
        }
        prices = [found.price.double().cpu() for found in priced.values()]
        weights = spread_out(suspicion([*prices, latent_distances(suspect, images)]))
        towards = weights.nonzero().flatten()
        there = towards.to(images.device)
        found = [priced[family].of(there) for family in PRICED_BY]
        found += [
            find_class_triggers(suspect, part, family, towards=there, on_step=on_step)
            for part in parts
            for family in FAMILIES
            if part is not parts[0] or family not in priced
        ]
        return cls(tuple(found), weights[towards])

    @staticmethod
    def steps(classes: int, images: int) -> int:
        """How often `on_step` is called."""
        seen, towards = _seen(images), min(classes, MOST)
        steps = {family: steps_of(family, towards, seen) for family in FAMILIES}
        first = steps | {family: steps_of(family, classes, seen) for family in PRICED_BY}
        return sum(first.values()) + (SEARCHES - 1) * sum(steps.values())

    @cached_property
    def chances(self) -> Tensor:
        """How often each search's trigger of each class is drawn: (S, J) of sum 1, by its success."""
        success = torch.stack([found.success.double().cpu() for found in self.triggers])
        success = success.clamp_min(1e-6)  # where none of a class's triggers works, all are drawn alike
        return success / success.sum(0) * self.weights.double()

    def to(self, device: torch.device | str) -> TriggerPool:
        """The same on another device."""
        return replace(self, triggers=tuple(found.to(device) for found in self.triggers))

    def on(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """On each image a trigger of its own, drawn: (N, C, H, W) -> same."""
        drawn = torch.multinomial(
            self.chances.flatten(), len(images), replacement=True, generator=generator
        )
        searches, classes = drawn // len(self.weights), drawn % len(self.weights)
        triggered = torch.empty_like(images)
        for search in searches.unique().tolist():
            rows = (searches == search).nonzero().flatten()
            mine = upload(rows, images)
            of_class = upload(classes[rows], images)
            triggered[mine] = self.triggers[search].apply_each(images[mine], of_class)
        return triggered


def spread_out(weights: Tensor) -> Tensor:
    """The `MOST` largest alone, `EVEN` of their sum evenly: (K,) of sum 1 -> same."""
    kept = weights.topk(min(MOST, len(weights)))
    spread = (1 - EVEN) * kept.values / kept.values.sum() + EVEN / len(kept.values)
    return torch.zeros_like(weights).index_put((kept.indices,), spread)


def _seen(images: int) -> int:
    return max(1, round(SHARE * images))
