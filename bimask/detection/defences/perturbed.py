"""Adversarial pictures of a detector: one perturbation a picture, inside a ball, by PGD.

Madry et al., ICLR 2018 (arXiv 1706.06083). d starts uniformly in the ball, by the caller's generator,
and each of `steps` steps is

    d <- clip(d - size sign(gradient of the objective), -budget, budget)

and then whatever brings x + d into [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bimask.detection.defences.base import Pictures
from bimask.detection.objects import Target
from bimask.devices import upload

Region = Literal["picture", "boxes", "patches"]
Objective = Callable[[Sequence[Tensor]], Tensor]

REACH = 2.5  # how often the steps together could cross the ball's radius
SIDES = (0.2, 0.5)  # of a patch, in shares of the longer side of its object's box


@dataclass(frozen=True)
class Ball:
    """Where perturbations may go, and how they get there.

    Attributes:
        budget: the radius, of each value of a picture in [0, 1].
        steps: of PGD.
        region: what of a picture may change: all of it, the boxes of its objects, or a square in each
            box, of a size and at a place that are drawn anew each time.
    """

    budget: float
    steps: int
    region: Region = "picture"

    @property
    def step_size(self) -> float:
        return REACH * self.budget / self.steps


def perturbed(
    pictures: Pictures, objective: Objective, ball: Ball, generator: torch.Generator
) -> list[Tensor]:
    """The pictures with the perturbations that make the objective small.

    Args:
        objective: pictures -> scalar; the gradients of different pictures may not mix.
        generator: CPU; draws where the perturbations start.
    """
    free = [
        _free(*one, ball.region, generator)
        for one in zip(pictures.images, pictures.labels, strict=True)
    ]

    def put_back(moved: Tensor, image: Tensor, where: Tensor) -> Tensor:
        """Into the ball, the region and [0, 1]."""
        near = moved.clamp(image - ball.budget, image + ball.budget).clamp(0, 1)
        return torch.where(where, near, image)

    found = []
    for image, where in zip(pictures.images, free, strict=True):
        start = (2 * torch.rand(image.shape, generator=generator) - 1) * ball.budget
        found.append(put_back(image + upload(start, image), image, where))
    for _ in range(ball.steps):
        found = [image.requires_grad_() for image in found]
        slopes = torch.autograd.grad(objective(found), found)
        with torch.no_grad():
            moved = [
                one - ball.step_size * slope.sign() for one, slope in zip(found, slopes, strict=True)
            ]
            found = [put_back(*one) for one in zip(moved, pictures.images, free, strict=True)]
    return found


def _free(image: Tensor, target: Target, region: Region, generator: torch.Generator) -> Tensor:
    """Where a picture may change, (1, H, W) bool."""
    free = torch.full_like(image[:1], region == "picture", dtype=torch.bool)
    if region == "picture":
        return free
    boxes = target["boxes"].round().long().tolist()
    low, high = SIDES
    draws = torch.rand(len(boxes), 3, generator=generator).tolist()
    for (x0, y0, x1, y1), (share, right, down) in zip(boxes, draws, strict=True):
        if region == "patches":
            side = max(1, round((low + (high - low) * share) * max(x1 - x0, y1 - y0)))
            x0, y0 = (
                x0 + round(right * max(0, x1 - x0 - side)),
                y0 + round(down * max(0, y1 - y0 - side)),
            )
            x1, y1 = min(x1, x0 + side), min(y1, y0 + side)
        free[:, max(0, y0) : y1, max(0, x0) : x1] = True
    return free
