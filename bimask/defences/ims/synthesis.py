"""The inner problem: perturbations that make the inverse-masked model and the victim err together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bimask.defences.ims.optim import AdamWState, bias_corrections
from bimask.devices import upload
from bimask.metrics.agreement import LossForm, agree, disagree

Norm = Literal["linf", "l2"]
InnerOptimizer = Literal["adamw", "sign"]
Answers = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Triggers:
    """What one inner problem ends with.

    Attributes:
        delta: (..., N, C, H, W) perturbations of the images, inside the budget.
        last: the perturbations that the last step started from.
        last_logits: the victim's logits under `last`, (..., N, K).
        agree, disagree: the two terms of the inner loss before each step, (steps, ...); NaN where a
            member of fewer steps has ended.
    """

    delta: Tensor
    last: Tensor
    last_logits: Tensor
    agree: Tensor
    disagree: Tensor


class TriggerSynthesizer:
    """Minimise agree(f_inverse(x+d), f(x+d)) + disagree(f(x+d), f(x)) over |d| <= budget.

    Dunnett et al. 2025, equation 5. d starts at 0, or where the caller says, and is projected onto the
    budget after each step. One synthesizer serves one set of images (N, C, H, W), or M members with
    settings of their own (M, N, C, H, W); a member's numbers do not depend on the others.

    Some images may share one universal perturbation (Moosavi-Dezfooli et al. 2017, arXiv 1610.08401):
    it follows the sum of their gradients, so what it finds works on all of them, as a trigger does.

    Args:
        steps: gradient steps, >= 1; the paper uses 20. Members: a list that does not rise.
        step_size: AdamW's learning rate, or the length of one sign step, in [0, 1] pixel units.
            Members: a list, or of each image, (M, N, 1, 1, 1).
        budget: largest norm of d, in [0, 1] pixel units: for "linf" of a pixel, for "l2" of an image.
            Members: a list, or of each image, (M, N, 1, 1, 1).
        norm: "linf" or "l2".
        optimizer: "adamw" as published, or "sign": d -= step_size * sign(gradient), for "l2" the
            gradient divided by its norm.
        momentum: of "sign", on gradients of unit L1 norm (Dong et al. 2018, equation 6); 0 for none.
        weight_decay: AdamW's, decoupled; "sign" has none. Members: a list.
        clip_images: keep x + d in [0, 1]; the published program does not.
        form: of the losses, see `bimask.metrics.agreement`.
        inverse_weight: of agree(f_abar(x + d), f(x + d)); 1 as published. Members: a list.
    """

    def __init__(
        self,
        *,
        steps: int | Sequence[int] = 20,
        step_size: float | Sequence[float] | Tensor = 0.001,
        budget: float | Sequence[float] | Tensor = 1.0,
        norm: Norm = "linf",
        optimizer: InnerOptimizer = "adamw",
        momentum: float = 0.0,
        weight_decay: float | Sequence[float] = 0.01,
        clip_images: bool = False,
        form: LossForm = "paper",
        inverse_weight: float | Sequence[float] = 1.0,
    ) -> None:
        self.steps = steps
        self.step_size = step_size
        self.budget = budget
        self.norm = norm
        self.optimizer = optimizer
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.clip_images = clip_images
        self.form: LossForm = form
        self.inverse_weight = inverse_weight

    def __call__(
        self,
        answers: Answers,
        images: Tensor,
        clean_logits: Tensor,
        *,
        start: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> Triggers:
        """Perturbations of `images`.

        Args:
            answers: perturbed images (..., N, C, H, W) -> logits (..., N, K) of the victim and of the
                inverse-masked model; no parameter of theirs needs a gradient. Of M members it gets
                those that still have steps to go, always the first ones.
            images: (..., N, C, H, W) in [0, 1].
            clean_logits: the victim's logits of `images`, (..., N, K), computed once by the caller.
            start: where d starts, inside the budget; None means 0, as published.
            shared: (..., N, 1, 1, 1) booleans, the images with one d in common, which `start` must give
                them too; that d is in the budget, and `perturb` clips what it does to an image.
        """
        steps = [self.steps] if isinstance(self.steps, int) else list(self.steps)
        lr, budget, decay = (
            _column(value, images) for value in (self.step_size, self.budget, self.weight_decay)
        )
        delta = torch.zeros_like(images) if start is None else start.clone()
        if start is not None:  # the images may have moved since
            self._project_(delta, images, budget, shared)
        weight = upload(self.inverse_weight, images)
        last, last_logits = delta.clone(), clean_logits.clone()
        moments = AdamWState(delta) if self.optimizer == "adamw" else None
        velocity = torch.zeros_like(delta) if self.momentum else None
        history = torch.full((max(steps), 2, *clean_logits.shape[:-2]), torch.nan, device=delta.device)
        history = history.to(delta)
        for step in range(max(steps)):
            going = sum(count > step for count in steps)
            # a single set of images has no dimension of members: all of it is going
            rows = slice(going) if len(steps) > 1 else slice(None)
            moved, x = delta[rows], images[rows]
            common = None if shared is None else shared[rows]
            point = moved.detach().clone().requires_grad_()
            logits, inverse_logits = answers(self.perturb(x, point, common))
            terms = torch.stack(
                [
                    agree(inverse_logits, logits, form=self.form)
                    * (weight[rows] if weight.ndim else weight),
                    disagree(logits, clean_logits[rows], form=self.form),
                ]
            )
            (gradient,) = torch.autograd.grad(terms.sum(), point)
            with torch.no_grad():
                if terms.ndim > 1:
                    history[step, :, rows] = terms
                else:
                    history[step] = terms
                last[rows], last_logits[rows] = moved, logits
                if common is not None:
                    gradient = torch.where(common, _total(gradient, common), gradient)
                column = lr[rows] if lr.ndim else lr
                if moments is not None:
                    first, second = bias_corrections(step + 1)
                    moments.step_(
                        moved,
                        gradient,
                        lr=column,
                        weight_decay=decay[rows] if decay.ndim else decay,
                        corrections=(first, second),
                        rows=rows,
                    )
                else:
                    if velocity is not None:
                        gradient = velocity[rows].mul_(self.momentum).add_(_unit_l1(gradient))
                    moved.sub_(column * self._direction(gradient))
                self._project_(moved, x, budget[rows] if budget.ndim else budget, common)
        return Triggers(delta, last, last_logits, *history.unbind(1))

    def perturb(self, images: Tensor, delta: Tensor, shared: Tensor | None = None) -> Tensor:
        """x + d, in [0, 1] if that is asked for: (..., N, C, H, W) -> same."""
        perturbed = images + delta
        if shared is None or not self.clip_images:
            return perturbed  # a d of one image alone has been clipped with it
        return torch.where(shared, perturbed.clamp(0, 1), perturbed)

    def _direction(self, gradient: Tensor) -> Tensor:
        """The steepest direction of unit length in the norm: (..., N, C, H, W) -> same."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / _l2(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)

    def _project_(self, delta: Tensor, images: Tensor, budget: Tensor, shared: Tensor | None) -> None:
        """Put delta back into the budget, and x + delta into [0, 1] if that is asked for."""
        if self.norm == "linf":
            torch.clamp(delta, -budget, budget, out=delta)
        else:
            # renorm-style: only images beyond the ball are scaled, never up
            delta.mul_(budget / torch.maximum(_l2(delta), budget))
        if self.clip_images:
            clipped = (images + delta).clamp_(0, 1) - images
            delta.copy_(clipped if shared is None else torch.where(shared, delta, clipped))


def _column(value: float | Sequence[float] | Tensor, images: Tensor) -> Tensor:
    """A number as a scalar tensor, one for each member as (M, 1, 1, 1, 1), a tensor as it is."""
    if isinstance(value, Tensor):
        return value
    column = upload(value, images)
    return column.view(-1, 1, 1, 1, 1) if column.ndim else column


def _l2(x: Tensor) -> Tensor:
    """Euclidean norm of every image: (..., C, H, W) -> (..., 1, 1, 1)."""
    return torch.linalg.vector_norm(x, dim=(-3, -2, -1), keepdim=True)


def _total(gradient: Tensor, shared: Tensor) -> Tensor:
    """The sum over the images that share: (..., N, C, H, W), (..., N, 1, 1, 1) -> (..., 1, C, H, W).

    In double, so that its last bits do not depend on how many members are beside (see `population`).
    """
    double = torch.float32 if gradient.device.type == "mps" else torch.float64
    return (gradient.to(double) * shared).sum(-4, keepdim=True).to(gradient)


def _unit_l1(x: Tensor) -> Tensor:
    """Every image divided by its L1 norm."""
    norm = torch.linalg.vector_norm(x, ord=1, dim=(-3, -2, -1), keepdim=True)
    return x / norm.clamp_min(torch.finfo(x.dtype).tiny)
