"""Triggers that are searched on the suspect before a defence begins, for it to learn against.

The inner problem makes up perturbations of one budget, image by image or in common. What attackers use
is of many kinds and leads to one class. So every class is asked for universal triggers of all families
in `bimask.class_triggers`, on clean images alone, and images get them at random: towards every class
alike, since not every backdoor makes its class cheap, but the more towards the cheapest one the further
it stands apart from the others, as most backdoors' does. Of a class's triggers those are drawn most
that send images there. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.class_triggers import FAMILIES, ClassTriggers, Family, find_class_triggers, steps_of
from bimask.devices import upload
from bimask.errors import DataError, SettingError
from bimask.evidence import costs
from bimask.latent import latent_distances

SEARCHES = 3  # of each family towards each class
SHARE = 0.3  # of the images that one search sees, so that no two find the same
APART = 0.6  # of the draws go to the cheapest class at most, where the next costs far more
MOST = 20  # classes, the cheapest ones
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
            SettingError: fewer than two classes, or the suspect's last layer is no nn.Linear.
        """
        if len(images) < 2:
            raise DataError(f"A search of triggers needs two clean images or more, got {len(images)}.")
        distances = latent_distances(suspect, images)
        if len(distances) < 2:
            raise SettingError(
                "A search of triggers leads images from one class to another, but the model has one "
                "class; set `class_triggers` to 0."
            )
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
        weights = draws(costs([*prices, distances]))
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


def draws(costs: Tensor) -> Tensor:
    """How often each class is drawn: (K,) logs of prices -> (K,) in [0, 1], of sum 1.

    The `MOST` cheapest classes share the draws evenly, but for APART (1 - p_1 / p_2) of them, which
    are the cheapest's alone: p_1 is its price, p_2 that of the next.
    """
    kept = costs.clamp_max(1e3).topk(min(MOST, len(costs)), largest=False)
    apart = APART * (1 - (kept.values[0] - kept.values[1]).exp())
    share = (1 - apart) / len(kept.values) + apart * F.one_hot(torch.tensor(0), len(kept.values))
    return torch.zeros_like(costs).index_put((kept.indices,), share)


def _seen(images: int) -> int:
    return max(1, round(SHARE * images))
