"""AdamW over many members at once, each with its own rate; equal to torch.optim.AdamW row by row."""

from __future__ import annotations

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8  # torch's defaults, which the published program uses


class AdamWState:
    """First and second moments of a tensor whose first dimension is the members.

    torch.optim.AdamW has one learning rate and one step count a tensor; here they are one a member,
    so that members may stand at different rounds, and one member's numbers do not depend on others.
    """

    def __init__(self, values: Tensor) -> None:
        self.first, self.second = torch.zeros_like(values), torch.zeros_like(values)

    @torch.no_grad()
    def step_(
        self,
        values: Tensor,
        gradient: Tensor,
        *,
        lr: Tensor,
        weight_decay: Tensor,
        corrections: tuple[Tensor | float, Tensor | float],
        rows: Tensor | slice = slice(None),
    ) -> None:
        """Update `values` in place (Loshchilov and Hutter 2019, algorithm 2).

        Args:
            values, gradient: (M, ...), of the members `rows`.
            lr, weight_decay: broadcast against `values`.
            corrections: from `bias_corrections`, broadcast against `values`.
            rows: which members of the state these are.
        """
        first = self.first[rows].lerp_(gradient, 1 - BETAS[0])
        second = self.second[rows].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        if not isinstance(rows, slice):  # indexing copied
            self.first[rows], self.second[rows] = first, second
        values.mul_(1 - lr * weight_decay)
        step_size, root = lr / corrections[0], corrections[1] ** 0.5
        values.sub_(step_size * first / (second.sqrt() / root + EPS))

    def forget(self, row: int) -> None:
        """Start the moments of one member anew."""
        self.first[row].zero_()
        self.second[row].zero_()


def bias_corrections(step: int) -> tuple[float, float]:
    """1 - beta^t of both moments at step t >= 1."""
    first, second = BETAS
    return 1 - first**step, 1 - second**step
