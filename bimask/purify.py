"""IMS, the outer problem: learn masks that keep the clean task and drop the backdoor.

Dunnett, Arablouei, Miller, Dedeoglu, Jurdak, "Backdoor Mitigation via Invertible Pruning Masks",
NeurIPS 2025 (arXiv 2509.15497). f is the frozen victim, f_a the masked, f_abar the inverse-masked
model, x clean images, d the inner problem's perturbations (`bimask.synthesis`).

    initialise   agree(f_a(x), f(x)) + disagree(f_abar(x), f(x)) + selection cost          (eq. 4)
    minimise     agree(f_a(x), f(x)) + agree(f_a(x+d), f(x)) + agree(f_abar(x+d), f(x+d))
                 + disagree(f_abar(x+d), f(x)) + disagree(f_abar(x), f(x))             (eqs. 6, 7)
    select       the same + selection cost

No label is used anywhere: only images enter.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from bimask.config import BudgetWarning, PurifyConfig
from bimask.errors import NonFiniteError, SettingError
from bimask.losses import agree, disagree, selection_cost
from bimask.masks import MaskSet, fold, fold_into, masked_forward
from bimask.synthesis import TriggerSynthesizer

Stage = Literal["initialise", "minimise", "select"]
Batch = Tensor | slice


@dataclass(frozen=True)
class RoundLog:
    """One round of the outer problem.

    Attributes:
        stage: "initialise", "minimise" or "select".
        round: from 0 within the stage.
        step: from 0 within the run.
        losses: term -> value before the round's update, in the order of the module's formulas.
        loss: their sum, which early stopping watches.
    """

    stage: Stage
    round: int
    step: int
    losses: dict[str, float]
    loss: float


@dataclass
class Passes:
    """Passes of one batch through the network, forward and backward."""

    forward: int = 0
    backward: int = 0

    def add(self, forward: int, backward: int) -> None:
        self.forward += forward
        self.backward += backward


@dataclass(frozen=True)
class PurifyResult:
    """What a purification ends with.

    Attributes:
        masks: the learned masks; `masked_forward(model, masks, x)` is the purified model.
        rounds: one log a round, in order.
        passes: counted passes.
        seconds: wall time.
        config: the settings used.
    """

    masks: MaskSet
    rounds: list[RoundLog]
    passes: Passes
    seconds: float
    config: PurifyConfig
    _model: nn.Module = field(repr=False)

    def model(self, *, inverse: bool = False) -> nn.Module:
        """The purified model (or its inverse twin): a plain copy with the masks folded in."""
        return fold(self._model, self.masks, inverse=inverse)


class _Plateau:
    """Published early stopping: more than `patience` rounds without `loss < threshold x best`."""

    def __init__(self, patience: int | None, threshold: float) -> None:
        self.patience, self.threshold = patience, threshold
        self.best, self.stale = float("inf"), 0

    def reached(self, loss: float) -> bool:
        if loss < self.threshold * self.best:
            self.best, self.stale = loss, 0
        else:
            self.stale += 1
        return self.patience is not None and self.stale > self.patience


def purify(
    model: nn.Module,
    images: Tensor,
    config: PurifyConfig | None = None,
    *,
    generator: torch.Generator | None = None,
    on_round: Callable[[RoundLog, MaskSet], None] | None = None,
) -> PurifyResult:
    """Learn the masks that remove a backdoor from `model`.

    Args:
        model: the suspect, (N, C, H, W) in [0, 1] -> (N, K) logits, with at least one Conv2d. It is
            copied, never edited; batch norm is frozen.
        images: clean images (N, C, H, W), float in [0, 1]. No labels.
        config: settings; None means the published ones.
        generator: CPU; draws the batches, and the images whose perturbations go on.
        on_round: called after every round with its log and the masks as they are then.

    Raises:
        SettingError: images of another shape or outside [0, 1].
        MaskMismatchError: the model has no Conv2d.
        NonFiniteError: a loss is NaN or infinite, with its stage and round.
    """
    config = config or PurifyConfig()
    _check_images(images)
    if (problem := config.unreachable_budget()) is not None:
        warnings.warn(problem, BudgetWarning, stacklevel=2)
    started = time.perf_counter()

    def frozen() -> nn.Module:
        twin = copy.deepcopy(model).eval().requires_grad_(False)
        return twin.to(memory_format=torch.channels_last)

    reference, inverse_twin = frozen(), frozen()
    masks = MaskSet.for_model(
        reference,
        sharpness=config.sharpness,
        mask=config.initial_mask,
        selection=config.initial_selection,
    )
    images = images.to(masks.mask).contiguous(memory_format=torch.channels_last)
    passes, rounds = Passes(), list[RoundLog]()
    with torch.no_grad():
        clean_logits = torch.cat([reference(part) for part in images.split(config.batch_size)])
    passes.add(forward=-(-len(images) // config.batch_size), backward=0)

    form = config.loss_form
    synthesize = TriggerSynthesizer(
        steps=config.inner_steps,
        step_size=config.resolved_step_size,
        budget=config.budget,
        norm=config.norm,
        optimizer=config.inner_optimizer,
        weight_decay=config.inner_weight_decay,
        clip_images=config.clip_images,
        form=form,
    )

    def clean_terms(batch: Batch) -> dict[str, Tensor]:
        """Equation 4 without the selection cost."""
        x, logits = images[batch], clean_logits[batch]
        passes.add(forward=2, backward=2)
        return {
            "clean_agree": agree(masked_forward(reference, masks, x), logits, form=form),
            "inverse_clean_disagree": disagree(
                masked_forward(reference, masks, x, inverse=True), logits, form=form
            ),
        }

    deltas = torch.zeros_like(images) if config.warm_start else None

    def triggered_terms(batch: Batch) -> dict[str, Tensor]:
        """Equations 5 to 7 without the selection cost: triggers first, then the masks' losses."""
        x, logits = images[batch], clean_logits[batch]
        fold_into(inverse_twin, reference, masks, inverse=True)
        start = None
        if deltas is not None:
            goes_on = torch.rand(len(x), 1, 1, 1, generator=generator) < config.warm_start
            start = deltas[batch] * goes_on.to(x)
        delta = synthesize(inverse_twin, reference, x, logits, start=start).delta
        if deltas is not None:
            deltas[batch] = delta
        triggered = x + delta
        with torch.no_grad():
            triggered_logits = reference(triggered)
        both = torch.cat([x, triggered])
        on_clean, on_triggered = masked_forward(reference, masks, both).chunk(2)
        inverse_clean, inverse_triggered = masked_forward(reference, masks, both, inverse=True).chunk(2)
        passes.add(forward=2 * config.inner_steps + 5, backward=2 * config.inner_steps + 4)
        return {
            "clean_agree": agree(on_clean, logits, form=form),
            "triggered_agree": agree(on_triggered, logits, form=form),
            "inverse_triggered_agree": agree(inverse_triggered, triggered_logits, form=form),
            "inverse_triggered_disagree": disagree(inverse_triggered, logits, form=form),
            "inverse_clean_disagree": disagree(inverse_clean, logits, form=form),
        }

    stages: list[tuple[Stage, int, float, Callable[[Batch], dict[str, Tensor]]]] = [
        ("initialise", config.initialise_rounds, config.selection_weight, clean_terms),
        ("minimise", config.minimise_rounds, 0.0, triggered_terms),
        ("select", config.select_rounds, config.selection_weight, triggered_terms),
    ]
    for stage, limit, weight, terms_of in stages:
        adamw = torch.optim.AdamW(
            masks.parameters(), lr=config.mask_lr, weight_decay=config.weight_decay
        )
        decays = config.mask_lr_schedule == "cosine" and stage == "select" and limit > 0
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, limit) if decays else None
        plateau = _Plateau(config.patience, config.threshold)
        best_loss, best = float("inf"), copy.deepcopy(masks.state_dict())
        for round_ in range(limit):
            batch = _draw(len(images), config.batch_size, generator, images.device)
            terms = terms_of(batch)
            terms["selection_cost"] = weight * selection_cost(masks.selections())
            stacked = torch.stack(list(terms.values()))
            values = dict(zip(terms, stacked.tolist(), strict=True))  # the round's only read-back
            log = RoundLog(stage, round_, len(rounds), values, sum(values.values()))
            _check_finite(log)
            if config.keep == "best" and log.loss < best_loss:
                best_loss, best = log.loss, copy.deepcopy(masks.state_dict())
            adamw.zero_grad()
            stacked.sum().backward()
            adamw.step()
            masks.clamp_()
            if schedule is not None:
                schedule.step()
            rounds.append(log)
            if on_round is not None:
                on_round(log, masks)
            if plateau.reached(log.loss):
                break
        if config.keep == "best" and limit:
            masks.load_state_dict(best)
    masks.requires_grad_(False)
    return PurifyResult(masks, rounds, passes, time.perf_counter() - started, config, model)


def _draw(n: int, batch_size: int, generator: torch.Generator | None, device: torch.device) -> Batch:
    """A fresh subset without replacement, or everything where the batch covers it."""
    if n <= batch_size:
        return slice(None)
    return torch.randperm(n, generator=generator)[:batch_size].to(device)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        raise SettingError(
            "Clean images must be a float tensor (N, C, H, W) with N >= 1, got "
            f"{tuple(images.shape)} of {images.dtype}."
        )
    low, high = (value.item() for value in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise SettingError(
            f"Clean images must lie in [0, 1], got [{low:g}, {high:g}]; divide bytes by 255 and "
            "leave normalisation to the model."
        )


def _check_finite(log: RoundLog) -> None:
    if not math.isfinite(log.loss):
        raise NonFiniteError(
            f"Loss not finite in stage {log.stage!r}, round {log.round}: {log.losses}; lower "
            "`mask_lr` or `step_size`."
        )
