"""Adversarial fine-tuning of detectors, but for what is adversarial: the loop, the budget, the choice.

Every step perturbs a batch of clean pictures x against the detector as it is, or against the suspect as
it came, and learns

    L_det(x) + weight * (the method's own loss on x + d)

with the running statistics of norms frozen. Some clean pictures are held back. After every epoch they
tell what the repair costs, and what it is worth: mAP@50 on them, and the method's own loss on
perturbations of them that are made anew. Of all epochs whose mAP@50 fell by
`budget` at most, the one with the smallest of these losses is kept. Where there is none, the suspect
comes back as it was, with a warning. A suspect that was trained on these very pictures looks better on
them than it is, and few pictures tell little: a budget has to be larger than the fall that one bears.

Every detector has weaknesses that are no backdoor. Against the detector as it is, perturbations move on
to them as soon as the backdoor is gone, and what is learned then costs clean precision. Against the
suspect they stay with its cheapest weakness, which a backdoor is.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from bimask.defences.loop import Loop, cosine, set_lr
from bimask.defences.settings import Search
from bimask.defences.sgd import descend
from bimask.defences.simple import BEGINNING, Defended, Keeper, OnOwnStep
from bimask.detection.defences.base import (
    DetectorConfig,
    DetectorDefence,
    Pictures,
    admitted,
    epoch_of,
    loss_of,
    pictures_of,
    sgd,
)
from bimask.detection.defences.perturbed import Ball, Objective, Region, perturbed
from bimask.detection.metrics.average_precision import average_precision
from bimask.detection.nets.detector import Detector
from bimask.errors import warn
from bimask.masking.copies import copied

Radius = Annotated[
    float,
    Field(gt=0, le=1, description="of a perturbation: how far a value in [0, 1] may move"),
    Search(0.03, 1.0, log=True),
]
AttackSteps = Annotated[int, Field(ge=1, description="of PGD, for every batch"), Search(2, 10)]
Against = Literal["current", "suspect"]
Weight = Annotated[
    float,
    Field(ge=0, description="of the loss on perturbed pictures, beside that on clean ones"),
    Search(0.03, 3, log=True),
]
REGION = (
    "what of a picture a perturbation may change: all, the boxes of its objects, or a square in each "
    "box, of a size and at a place drawn anew each time"
)
AGAINST = "what perturbations are made against: the detector as it is by then, or the suspect"


class RepairConfig(DetectorConfig):
    """What all adversarial repairs of detectors have; none of it is published."""

    radius: Radius = 0.1
    attack_steps: AttackSteps = 5
    region: Region = Field("picture", description=REGION)
    against: Against = Field("current", description=AGAINST)
    weight: Weight = 1.0
    held_out: float = Field(
        0.2, gt=0, lt=1, description="share of the clean pictures that epochs are judged on"
    )
    budget: float | None = Field(
        0.1,
        ge=0,
        le=1,
        description="how far mAP@50 on held-out pictures may fall; null keeps the last epoch",
    )

    def learned_on(self, images: int) -> int:
        """All but those held out, or the only one."""
        return max(1, images - held_of(images, self.held_out))

    @property
    def ball(self) -> Ball:
        return Ball(self.radius, self.attack_steps, self.region)


Settings = TypeVar("Settings", bound=RepairConfig)


class Repair(DetectorDefence[Settings], Generic[Settings]):
    """A defence that learns on perturbed pictures of its own; a method writes `objective` and
    `terms`."""

    numbers = ("held_out_map50", "budget_used")

    @abstractmethod
    def objective(self, detector: Detector, batch: Pictures, config: Settings) -> Objective:
        """What perturbations of a batch make small."""

    @abstractmethod
    def terms(self, detector: Detector, batch: Pictures, config: Settings) -> dict[str, Tensor]:
        """The loss on perturbed pictures, by terms, without its weight."""

    def defend(
        self,
        model: nn.Module,
        clean: Any,
        config: Settings,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[Settings]:
        """Learn on clean and perturbed pictures. Epochs are what a run goes on from."""
        detector = admitted(model)
        suspect = admitted(model).requires_grad_(False)
        against = suspect if config.against == "suspect" else detector
        learned, held = split(pictures_of(clean), config.held_out, generator)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        before = _map50(detector, held)
        kept, optimiser = Kept(detector, before), sgd(detector, config)
        with Loop(
            self,
            model,
            config,
            {"net": detector, "moments": optimiser, "kept": kept},
            lambda: (kept.detector.state_dict(), kept.numbers(before, config.budget)),
            generator=generator,
            device=learned.images[0].device,
            keeper=keeper,
        ) as loop:
            for epoch in loop.epochs(config.epochs):
                set_lr(optimiser, config.lr * cosine(epoch, config.epochs))
                for batch in epoch_of(learned, config.batch_size, generator, flip=config.flip):
                    moved = self._perturbed(against, batch, config, generator)
                    own = self.terms(detector, moved, config) if len(moved) else {}
                    clean_losses = detector.losses(batch.images, batch.labels)
                    terms = {**clean_losses, **{k: config.weight * v for k, v in own.items()}}
                    descend(optimiser, loss_of(terms))
                    loop.passes.add(forward=config.attack_steps + 2, backward=config.attack_steps + 2)
                    if loop.step({name: term.item() for name, term in terms.items()}, on_step):
                        return loop.result()
                fixed = torch.Generator().manual_seed(seed)
                worth = self._worth(detector, against, held, config, fixed)
                kept.judge(detector, _map50(detector, held), worth, before, config.budget)
            if not kept.any:
                warn(
                    f"{self.name} cost more than {config.budget} of mAP@50 on {len(held)} held-out "
                    "pictures in every epoch, so the suspect comes back as it was; lower `lr` or "
                    "`weight`, or raise `budget`."
                )
            return loop.result()

    def _perturbed(
        self, detector: Detector, batch: Pictures, config: Settings, generator: torch.Generator
    ) -> Pictures:
        """Perturbed pictures; those without objects have nothing to be perturbed against."""
        rows = [row for row, target in enumerate(batch.labels) if len(target["labels"])]
        batch = batch.at(rows)
        if not rows:
            return batch
        objective = self.objective(detector, batch, config)
        return Pictures(perturbed(batch, objective, config.ball, generator), batch.labels)

    def _worth(
        self,
        detector: Detector,
        against: Detector,
        held: Pictures,
        config: Settings,
        generator: torch.Generator,
    ) -> float:
        """The method's own loss on perturbations of held-out pictures, the mean over the pictures."""
        total = 0.0
        for start in range(0, len(held), config.batch_size):
            batch = held.at(range(start, min(len(held), start + config.batch_size)))
            moved = self._perturbed(against, batch, config, generator)
            if len(moved):
                with torch.no_grad():
                    found = self.terms(detector, moved, config)
                total += len(moved) * float(loss_of(found))
        return total / len(held)


class Kept(nn.Module):
    """The best epoch within the budget so far; at first the suspect.

    Args:
        detector: the suspect; it is copied.
        map50: its own, on the held-out pictures.
    """

    worth: Tensor
    map50: Tensor

    def __init__(self, detector: Detector, map50: float) -> None:
        super().__init__()
        self.detector = copied(detector)
        self.register_buffer("worth", torch.tensor(math.inf))
        self.register_buffer("map50", torch.tensor(map50, dtype=torch.float64))

    @property
    def any(self) -> bool:
        return math.isfinite(float(self.worth))

    def judge(
        self, detector: Detector, map50: float, worth: float, before: float, budget: float | None
    ) -> None:
        """Keep the detector if it is within the budget and better than what was kept."""
        if budget is None or (before - map50 <= budget and worth < float(self.worth)):
            self.detector.load_state_dict(detector.state_dict())
            self.worth.fill_(worth)
            self.map50.fill_(map50)

    def numbers(self, before: float, budget: float | None) -> dict[str, float]:
        """mAP@50 on the held-out pictures, and the share of the budget that it took."""
        drop = max(0.0, before - float(self.map50))
        used = min(1.0, drop / budget) if budget else 0.0
        return {"held_out_map50": float(self.map50), "budget_used": used}


def held_of(images: int, share: float) -> int:
    """How many of so many pictures are held out: one at least, and not all."""
    return min(max(1, round(share * images)), max(1, images - 1))


def split(pictures: Pictures, share: float, generator: torch.Generator) -> tuple[Pictures, Pictures]:
    """Pictures to learn on, and pictures to judge by; an only one is both. Those to judge by have an
    object, as far as there are such."""
    order = torch.randperm(len(pictures), generator=generator).tolist()
    order.sort(key=lambda row: len(pictures.labels[row]["labels"]) == 0)
    count = held_of(len(pictures), share)
    return pictures.at(sorted(order[count:] or order)), pictures.at(sorted(order[:count]))


@torch.no_grad()
def _map50(detector: Detector, pictures: Pictures, size: int = 32) -> float:
    found = []
    for start in range(0, len(pictures), size):
        found += detector(pictures.images[start : start + size])
    return average_precision(found, pictures.labels).map50
