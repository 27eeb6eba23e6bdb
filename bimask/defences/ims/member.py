"""Where one member of a population stands, and what its settings say of the round it is at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bimask.defences.base import Passes
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.result import PurifyResult, RoundLog, Stage
from bimask.defences.ims.synthesis import InnerOptimizer, Norm
from bimask.devices import upload
from bimask.errors import NonFiniteError
from bimask.metrics.agreement import LossForm


@dataclass(frozen=True)
class Shared:
    """What the members of a group have in common in a round: all that the objective may read of their
    settings as one, since members are grouped by it.

    Attributes:
        triggered: whether the stage needs triggers.
        batch_size: images that each looks at.
        reuses_last_pass, augments, class_triggers: whether each does.
    """

    triggered: bool
    batch_size: int
    loss_form: LossForm
    norm: Norm
    inner_optimizer: InnerOptimizer
    inner_momentum: float
    clip_images: bool
    reuses_last_pass: bool
    straight_through: bool
    augments: bool
    class_triggers: bool


class Plateau:
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


class Member:
    """Where one member stands: its stage and round, and what it has logged."""

    def __init__(self, row: int, config: PurifyConfig, generator: torch.Generator | None) -> None:
        self.row, self.config, self.generator = row, config, generator
        self.rounds: list[RoundLog] = []
        self.passes = Passes()
        self.result: PurifyResult | NonFiniteError | None = None
        limits: dict[Stage, int] = {
            "initialise": config.initialise_rounds,
            "minimise": config.minimise_rounds,
            "select": config.select_rounds,
        }
        self.limits = {stage: limit for stage, limit in limits.items() if limit}
        self.stages = list(self.limits)
        self.begin_stage()

    def begin_stage(self) -> None:
        self.round = 0
        self.plateau = Plateau(self.config.patience, self.config.threshold)

    @property
    def stage(self) -> Stage:
        return self.stages[0]

    @property
    def lr(self) -> float:
        """The rate of the round, as torch's CosineAnnealingLR has it in closed form."""
        rate = self.config.mask_lr
        if self.config.mask_lr_schedule == "cosine" and self.stage == "select":
            rate *= (1 + math.cos(math.pi * self.round / self.limits["select"])) / 2
        return rate

    @property
    def selection_weight(self) -> float:
        return 0.0 if self.stage == "minimise" else self.config.selection_weight

    @property
    def averaging(self) -> float:
        """Weight of the round's masks in the mean of those of select's second half; 0 before it."""
        if self.config.keep != "average" or self.stage != "select":
            return 0.0
        since = self.round - self.limits["select"] // 2
        return 1 / (since + 1) if since >= 0 else 0.0

    @property
    def batch_size(self) -> int:
        early = self.config.early_batch_size
        return early if early is not None and self.stage != "select" else self.config.batch_size

    @property
    def inner_steps(self) -> int:
        """The round's inner steps; 0 where the stage needs no triggers."""
        if self.stage == "initialise":
            return 0
        total = sum(limit for stage, limit in self.limits.items() if stage != "initialise")
        done = self.round + (self.limits.get("minimise", 0) if self.stage == "select" else 0)
        return self.config.inner_steps_at(done / max(1, total - 1))

    @property
    def reuses_last_pass(self) -> bool:
        """Whether the inner problem's last answers serve: not where images are replaced after it."""
        return self.config.reuse_last_pass and not self.config.class_triggers

    def shared(self, images: int) -> Shared:
        """What the round's members must agree in to go through it together."""
        c = self.config
        return Shared(
            triggered=self.inner_steps > 0,
            batch_size=min(images, self.batch_size),
            loss_form=c.loss_form,
            norm=c.norm,
            inner_optimizer=c.inner_optimizer,
            inner_momentum=c.inner_momentum,
            clip_images=c.clip_images,
            reuses_last_pass=self.reuses_last_pass,
            straight_through=c.straight_through,
            augments=c.augments,
            class_triggers=c.class_triggers > 0,
        )


def column(value: Callable[[Member], float], members: Sequence[Member], like: Tensor) -> Tensor:
    """A setting of each member as (M, 1), in the dtype of `like` and where it lives."""
    host = torch.tensor([value(member) for member in members], dtype=like.dtype)
    return upload(host, like).view(-1, 1)
