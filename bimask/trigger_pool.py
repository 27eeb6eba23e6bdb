"""Triggers that are searched on the suspect before a defence begins, for it to learn against.

The inner problem makes up perturbations of one budget, image by image or in common. What attackers use
is of many kinds and leads to one class. So the classes that are cheap to reach
(`bimask.evidence.suspicion`) are asked for universal triggers of every family in
`bimask.class_triggers`, several of each, on clean images alone. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bimask.class_triggers import FAMILIES, ClassTriggers, Family, find_class_triggers, steps_of
from bimask.errors import DataError
from bimask.evidence import suspicion
from bimask.latent import latent_distances

SEARCHES = 3  # of each family towards each suspicious class
SHARE = 0.6  # of the images that one search sees, so that no two find the same
PRICED_BY: tuple[Family, ...] = ("patch", "pattern")


@dataclass(frozen=True)
class TriggerPool:
    """Universal triggers of a suspect model.

    Attributes:
        triggers: one a search, of the same J classes each.
        weights: (J,) how suspicious each class is, in [0, 1], of sum 1.
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
            on_step: called after each of `TriggerPool.steps(K, N)` steps, or of a few more where many
                classes are suspicious.

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
        prices = [
            find_class_triggers(suspect, parts[0], family, on_step=on_step).price.double().cpu()
            for family in PRICED_BY
        ]
        weights = suspicion([*prices, latent_distances(suspect, images)])
        towards = weights.nonzero().flatten()
        there = towards.to(images.device)
        found = [
            find_class_triggers(suspect, part, family, towards=there, on_step=on_step)
            for part in parts
            for family in FAMILIES
        ]
        return cls(tuple(found), weights[towards])

    @staticmethod
    def steps(classes: int, images: int) -> int:
        """How often `on_step` is called."""
        seen = _seen(images)
        pricing = sum(steps_of(family, classes, seen) for family in PRICED_BY)
        return pricing + SEARCHES * sum(steps_of(family, 1, seen) for family in FAMILIES)

    def to(self, device: torch.device | str) -> TriggerPool:
        """The same on another device."""
        return replace(self, triggers=tuple(found.to(device) for found in self.triggers))

    @torch.no_grad()
    def on(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """One trigger, drawn, on all images: (N, C, H, W) -> same."""
        of_class = int(torch.multinomial(self.weights, 1, generator=generator))
        which = int(torch.randint(len(self.triggers), (), generator=generator))
        return self.triggers[which].apply(images)[of_class]


def _seen(images: int) -> int:
    return max(1, round(SHARE * images))
