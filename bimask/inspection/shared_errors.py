"""Adversarial images of a suspect, and on how many of them another model makes the same error.

Made once, against the suspect f on clean images x, by 10 sign-gradient steps away from f's own answer,
L-inf 0.3 and 0.8, clipped to [0, 1]. A model g that keeps f's short cuts errs where f does, and alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bimask.metrics.agreement import disagree

BUDGETS = (0.3, 0.8)
STEPS = 10


@dataclass(frozen=True)
class Stressed:
    """Adversarial images and the suspect's answers to them."""

    images: Tensor
    answers: Tensor

    @classmethod
    def of(cls, suspect: nn.Module, images: Tensor) -> Stressed:
        return cls(images, answers_of(suspect, images))

    def to(self, device: torch.device | str) -> Stressed:
        return Stressed(self.images.to(device), self.answers.to(device))

    def same_answer(self, model: nn.Module, clean_answers: Tensor) -> float:
        """Among images that the suspect errs on, the share that the model gives the suspect's answer;
        NaN where it errs on none."""
        counts = self.answers != clean_answers
        return share((answers_of(model, self.images) == self.answers)[counts])


class SharedErrors:
    """How far a model shares a suspect's errors; asked of one model after another.

    Args:
        suspect: images in [0, 1] -> logits, in eval mode; left as it is.
        images: (N, C, H, W) in [0, 1], clean, of the suspect's dtype and device.

    Attributes:
        images, errors: the adversarial images that the suspect errs on, (M, C, H, W) in [0, 1], and its
            answers to them, (M,).
    """

    def __init__(self, suspect: nn.Module, images: Tensor) -> None:
        answers = answers_of(suspect, images)
        made = [Stressed.of(suspect, adversarial(suspect, images, b)) for b in BUDGETS]
        errs = [one.answers != answers for one in made]
        self.images = torch.cat([one.images[err] for one, err in zip(made, errs, strict=True)])
        self.errors = torch.cat([one.answers[err] for one, err in zip(made, errs, strict=True)])

    def __call__(self, model: nn.Module) -> float:
        """The share of them, in [0, 1], on which a model answers as the suspect; 0 where it errs on
        none."""
        return share(answers_of(model, self.images) == self.errors) if len(self.images) else 0.0


def adversarial(suspect: nn.Module, images: Tensor, budget: float) -> Tensor:
    """Images away from the suspect's own answers: sign steps of budget / steps on -disagree."""
    with torch.no_grad():
        clean = suspect(images)
    moved = images
    for _ in range(STEPS):
        point = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(disagree(suspect(point), clean, form="log"), point)
        moved = moved.detach() - budget / STEPS * gradient.sign()
        moved = (images + (moved - images).clamp(-budget, budget)).clamp(0, 1)
    return moved


@torch.no_grad()
def answers_of(model: nn.Module, images: Tensor) -> Tensor:
    """Classes: (N, C, H, W) -> (N,)."""
    return torch.cat([model(part).argmax(1) for part in images.split(512)])


def share(hits: Tensor) -> float:
    """Of booleans, those that are true."""
    return hits.double().mean().item()
