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
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from bimask.errors import NonFiniteError, SettingError
from bimask.losses import LossForm, agree, disagree, selection_cost
from bimask.masks import MaskSet, fold, fold_into, masked_forward
from bimask.synthesis import InnerOptimizer, Norm, TriggerSynthesizer

Stage = Literal["initialise", "minimise", "select"]
Batch = Tensor | slice
Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class BudgetWarning(UserWarning):
    """The perturbation budget cannot be reached with these steps, so it bounds nothing."""


class PurifyConfig(BaseModel):
    """Every setting of IMS; the defaults are the published ones.

    `step_size` null means budget / inner_steps, so that the budget is just reached. `patience` null
    means that every stage runs all its rounds. Budgets and steps are in [0, 1] pixel units.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sharpness: Positive = Field(20.0, description="k, the slope of the mask's sigmoid")
    initial_mask: Unit = Field(1.0, description="a at the start")
    initial_selection: Unit = Field(1.0, description="s at the start; below 1, a has a gradient")
    mask_lr: Positive = Field(0.02, description="AdamW's rate on masks and selections")
    mask_lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="cosine: from mask_lr to 0 over the rounds of select"
    )
    weight_decay: NonNegative = Field(0.01, description="AdamW's on masks and selections")
    selection_weight: NonNegative = Field(10.0, description="lambda of initialise and select")
    initialise_rounds: int = Field(100, ge=0)
    minimise_rounds: int = Field(200, ge=0)
    select_rounds: int = Field(200, ge=0)
    patience: int | None = Field(25, ge=0, description="rounds without progress a stage bears")
    threshold: float = Field(0.98, gt=0, le=1, description="progress: loss < threshold x best")
    keep: Literal["last", "best"] = Field("last", description="iterate a stage hands on")
    batch_size: int = Field(256, ge=1, description="images drawn anew for each round")
    loss_form: LossForm = "paper"
    inner_steps: int = Field(20, ge=1)
    step_size: Positive | None = Field(0.001, description="of one inner step")
    budget: Positive = Field(1.0, description="largest perturbation")
    norm: Norm = "linf"
    inner_optimizer: InnerOptimizer = "adamw"
    inner_weight_decay: NonNegative = Field(0.01, description="AdamW's on the perturbation")
    clip_images: bool = Field(False, description="keep perturbed images in [0, 1]")
    warm_start: Unit = Field(0.0, description="share of images whose perturbation goes on, not from 0")

    @property
    def resolved_step_size(self) -> float:
        """The length of one inner step."""
        return self.budget / self.inner_steps if self.step_size is None else self.step_size

    def unreachable_budget(self) -> str | None:
        """One sentence if step size x steps cannot reach the budget, else None.

        A step of AdamW or of the sign moves a pixel by about the step size at most, so the reach
        bounds the perturbation before the budget does. Under "l2" only sign steps have such a bound.
        """
        reach = self.resolved_step_size * self.inner_steps
        bounded = self.norm == "linf" or self.inner_optimizer == "sign"
        if not bounded or reach >= self.budget * (1 - 1e-9):
            return None
        return (
            f"The budget {self.budget:g} is never reached: {self.inner_steps} steps of "
            f"{self.resolved_step_size:g} end at {reach:g} at most; raise `step_size` or "
            f"`inner_steps`, or lower `budget` to {reach:g}."
        )

    @classmethod
    def from_yaml(cls, path: str | Path) -> PurifyConfig:
        """The settings in a YAML file, such as a study's best.yaml: under `purify`, or at the top.

        Raises:
            SettingError: no such file, not a mapping, or settings that do not fit, all named.
        """
        try:
            content = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise SettingError(f"Cannot read the configuration {path}: {error}.") from error
        if not isinstance(content, dict):
            raise SettingError(f"{path} must hold `setting: value` lines, got {content!r}.")
        try:
            return cls.model_validate(content.get("purify", content))
        except ValidationError as error:
            raise SettingError(f"{path}: {describe(error)}") from error


def describe(error: ValidationError) -> str:
    """All problems of a validation in one line: place, what is wrong, what was got."""
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'top level'}: "
        f"{problem['msg'][0].lower()}{problem['msg'][1:]}, got {problem['input']!r}"
        for problem in error.errors()
    )


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
        generator: draws the batches (CPU); unused while `batch_size` covers all images.
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
        decays = config.mask_lr_schedule == "cosine" and stage == "select"
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, limit) if decays else None
        plateau = _Plateau(config.patience, config.threshold)
        best_loss, best = float("inf"), copy.deepcopy(masks.state_dict())
        for round_ in range(limit):
            batch = _draw(len(images), config.batch_size, generator, images.device)
            terms = terms_of(batch)
            terms["selection_cost"] = weight * selection_cost(masks.selections())
            loss = torch.stack(list(terms.values())).sum()
            adamw.zero_grad()
            loss.backward()
            if config.keep == "best" and loss.item() < best_loss:
                best_loss, best = loss.item(), copy.deepcopy(masks.state_dict())
            adamw.step()
            masks.clamp_()
            if schedule is not None:
                schedule.step()

            values = torch.stack(list(terms.values())).tolist()  # the round's only read-back
            log = RoundLog(
                stage, round_, len(rounds), dict(zip(terms, values, strict=True)), loss.item()
            )
            rounds.append(log)
            _check_finite(log)
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
    if not all(map(torch.isfinite, map(torch.tensor, log.losses.values()))):
        raise NonFiniteError(
            f"Loss not finite in stage {log.stage!r}, round {log.round}: {log.losses}; lower "
            "`mask_lr` or `step_size`."
        )


def settings() -> dict[str, Any]:
    """Name -> published value of every setting of `PurifyConfig`."""
    return PurifyConfig().model_dump()
