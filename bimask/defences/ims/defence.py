"""Invertible pruning masks, learned against triggers that their own inverse makes up.

Dunnett, Arablouei, Miller, Dedeoglu, Jurdak, "Backdoor Mitigation via Invertible Pruning Masks",
NeurIPS 2025 (arXiv 2509.15497). Every channel has a mask a and a selection s. With the slope k of the
mask's sigmoid, a channel of the kept model f_a and of its inverse f_abar is multiplied by

    a' + s (1 - a'),   a' = sigmoid(k (a - 1/2)),   in the inverse with 1 - a in place of a

The inner problem makes up a perturbation d of each clean image that moves the inverse and the suspect f
alike, and away from the clean answer. The outer problem learns a and s so that f_a agrees with f on
clean images and ignores d, while f_abar follows d and drops the clean task (`objective.py`).

Use it where few clean images are there and nobody said their labels. It costs a round of forward and
backward passes for each of its some hundreds of rounds; `profile: fast` needs about 50. It needs no
labels. The profile `robust` also masks linear layers, attention heads and norms, and learns on searched
triggers, for nets that nobody tuned it on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bimask.defences.base import (
    BetweenSteps,
    CleanData,
    Defence,
    DefenceResult,
    OnStep,
    Preparation,
)
from bimask.defences.ims.checkpoint import PopulationState
from bimask.defences.ims.config import ENGINE, PurifyConfig
from bimask.defences.ims.population import PopulationPurifier
from bimask.defences.ims.result import PurifyResult, RoundLog
from bimask.defences.ims.synthesis import TriggerSynthesizer
from bimask.defences.state import DefenceState
from bimask.errors import NonFiniteError, SettingError
from bimask.inspection.trigger_pool import TriggerPool
from bimask.masking.masks import MaskSet, fold


class Ims(Defence[PurifyConfig]):
    """Invertible pruning masks; configurations that share an engine are one population."""

    name = "ims"
    config = PurifyConfig
    numbers = ("pruned_share",)
    stem = "masks"
    has_twin = True
    ends_early = True  # with `patience`

    def preparation(self, may_use: Callable[[str], bool]) -> Preparation | None:
        """The pool that `class_triggers` are drawn from."""
        if not may_use("class_triggers"):
            return None
        return Preparation("searching triggers", TriggerPool.search, TriggerPool.steps)

    def batch_key(self, config: PurifyConfig) -> Hashable:
        """What prepares the one net that a population shares."""
        return tuple(getattr(config, name) for name in ENGINE)

    def run(
        self,
        model: nn.Module,
        clean: CleanData,
        configs: Sequence[PurifyConfig],
        *,
        generators: Sequence[torch.Generator],
        prepared: Any = None,
        on_step: OnStep | None = None,
        state: DefenceState | None = None,
        between_steps: BetweenSteps | None = None,
    ) -> list[DefenceResult | NonFiniteError]:
        def on_round(row: int, log: RoundLog, masks: MaskSet) -> bool | None:
            assert on_step is not None
            member = population.members[row]

            def current() -> PurifyResult:
                seconds = time.perf_counter() - population.started
                plain = population.admitted.plain
                return PurifyResult(masks, member.rounds, member.passes, seconds, member.config, plain)

            return on_step(row, log, current)

        population = PopulationPurifier(
            model,
            clean.images,
            configs,
            generators=generators,
            pool=prepared,
            on_round=None if on_step is None else on_round,
        )
        if state is not None:
            _resume(population, state)

        def between() -> None:
            assert between_steps is not None
            between_steps(lambda: PopulationState.of(population))

        results = population.run(between_rounds=None if between_steps is None else between)
        return list(results)

    def restore(
        self, model: nn.Module, tensors: Mapping[str, Tensor], config: PurifyConfig
    ) -> nn.Module:
        """The model with the masks folded in."""
        return fold(model, self.masks(tensors, config))

    def twin(self, model: nn.Module, tensors: Mapping[str, Tensor], config: PurifyConfig) -> nn.Module:
        """The model with the inverse masks folded in."""
        return fold(model, self.masks(tensors, config), inverse=True)

    def synthesised(
        self, model: nn.Module, tensors: Mapping[str, Tensor], images: Tensor, config: PurifyConfig
    ) -> dict[str, Tensor]:
        """What the inner problem makes up, from 0: for each image, and in common where a share is."""
        inverse = self.twin(model, tensors, config).requires_grad_(False)
        with torch.no_grad():
            clean_logits = model(images)
        made = {}
        for common in range(2 if config.universal else 1):
            synthesize = TriggerSynthesizer(
                steps=config.inner_steps,
                step_size=config.step_sizes(config.inner_steps)[common],
                budget=config.budgets[common],
                norm=config.norm,
                optimizer=config.inner_optimizer,
                momentum=config.inner_momentum,
                weight_decay=config.inner_weight_decay,
                clip_images=config.clip_images,
                form=config.loss_form,
            )
            shared = torch.full((len(images), 1, 1, 1), True) if common else None
            made["common" if common else "each"] = synthesize(
                lambda x: (model(x), inverse(x)), images, clean_logits, shared=shared
            ).delta
        return made

    def masks(self, tensors: Mapping[str, Tensor], config: PurifyConfig) -> MaskSet:
        """The masks as they were learned."""
        return MaskSet.from_tensors(
            dict(tensors), sharpness=config.sharpness, straight_through=config.straight_through
        )


def _resume(population: PopulationPurifier, state: DefenceState) -> None:
    """Bring the population to where it stood; one of other members begins at the beginning."""
    try:
        PopulationState(state.tensors, state.members, state.seconds).put_into(population)
    except SettingError:
        return
