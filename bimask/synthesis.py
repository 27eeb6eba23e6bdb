"""The inner problem: perturbations that make the inverse-masked model and the victim err together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bimask.losses import LossForm, agree, disagree

Norm = Literal["linf", "l2"]
InnerOptimizer = Literal["adamw", "sign"]


@dataclass(frozen=True)
class Triggers:
    """What one inner problem ends with.

    Attributes:
        delta: (N, C, H, W) perturbations of the images, inside the budget.
        agree, disagree: the two terms of the inner loss before each step, (steps,).
    """

    delta: Tensor
    agree: Tensor
    disagree: Tensor


class TriggerSynthesizer:
    """Minimise agree(f_inverse(x+d), f(x+d)) + disagree(f(x+d), f(x)) over |d| <= budget.

    Dunnett et al. 2025, equation 5. d starts at 0, or where the last
    round left it, and is projected onto the budget after each step.

    Args:
        steps: gradient steps, >= 1; the paper uses 20.
        step_size: AdamW's learning rate, or the length of one sign step, in [0, 1] pixel units.
        budget: largest norm of d, in [0, 1] pixel units: for "linf" of a pixel, for "l2" of an image.
        norm: "linf" or "l2".
        optimizer: "adamw" as published, or "sign": d -= step_size * sign(gradient), for "l2" the
            gradient divided by its norm.
        weight_decay: AdamW's, decoupled; "sign" has none.
        clip_images: keep x + d in [0, 1]; the published program does not.
        form: of the losses, see `bimask.losses`.
    """

    def __init__(
        self,
        *,
        steps: int = 20,
        step_size: float = 0.001,
        budget: float = 1.0,
        norm: Norm = "linf",
        optimizer: InnerOptimizer = "adamw",
        weight_decay: float = 0.01,
        clip_images: bool = False,
        form: LossForm = "paper",
    ) -> None:
        self.steps = steps
        self.step_size = step_size
        self.budget = budget
        self.norm = norm
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.clip_images = clip_images
        self.form: LossForm = form

    def __call__(
        self,
        inverse: Callable[[Tensor], Tensor],
        reference: Callable[[Tensor], Tensor],
        images: Tensor,
        clean_logits: Tensor,
        *,
        start: Tensor | None = None,
    ) -> Triggers:
        """Perturbations of `images`.

        Args:
            inverse, reference: (N, C, H, W) -> (N, K) logits; their parameters need no gradient.
            images: (N, C, H, W) in [0, 1].
            clean_logits: reference(images), (N, K), computed once by the caller.
            start: where d starts, inside the budget, (N, C, H, W); None means 0, as published.
        """
        delta = (torch.zeros_like(images) if start is None else start.clone()).requires_grad_()
        adamw = torch.optim.AdamW([delta], lr=self.step_size, weight_decay=self.weight_decay)
        history = []
        for _ in range(self.steps):
            perturbed = images + delta
            logits = reference(perturbed)
            terms = torch.stack(
                [
                    agree(inverse(perturbed), logits, form=self.form),
                    disagree(logits, clean_logits, form=self.form),
                ]
            )
            (gradient,) = torch.autograd.grad(terms.sum(), delta)
            history.append(terms.detach())
            with torch.no_grad():
                if self.optimizer == "adamw":
                    delta.grad = gradient
                    adamw.step()
                else:
                    delta.sub_(self.step_size * self._direction(gradient))
                self._project_(delta, images)
        agreed, disagreed = torch.stack(history).unbind(1)
        return Triggers(delta.detach(), agreed, disagreed)

    def _direction(self, gradient: Tensor) -> Tensor:
        """The steepest direction of unit length in the norm: (N, C, H, W) -> same."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / _l2(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)

    def _project_(self, delta: Tensor, images: Tensor) -> None:
        """Put delta back into the budget, and x + delta into [0, 1] if that is asked for."""
        if self.norm == "linf":
            delta.clamp_(-self.budget, self.budget)
        else:
            # renorm-style: only images beyond the ball are scaled, never up
            delta.mul_(self.budget / _l2(delta).clamp_min(self.budget))
        if self.clip_images:
            delta.copy_((images + delta).clamp_(0, 1) - images)


def _l2(x: Tensor) -> Tensor:
    """Euclidean norm of every image: (N, C, H, W) -> (N, 1, 1, 1)."""
    return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
