"""The weight of what is to become small, by how good each step was: the rule of Neural Cleanse."""

from __future__ import annotations

import torch
from torch import Tensor

UP = 2.0
DOWN = UP**1.5


class CostSchedule:
    """A weight c that grows while steps are good and falls while they are not.

        c fell below its first value, and `patience` good steps followed:  c becomes that value
        `patience` good steps in a row:                                    c doubles
        `patience` bad steps in a row:                                     c is divided by 2^1.5

    Args:
        first: the weight in the first step.
        patience: steps in a row.

    Attributes:
        cost: the weight in the next step.
    """

    def __init__(self, first: float, patience: int) -> None:
        self.first, self.patience = first, patience
        self.cost = first
        self.back = self.up = self.down = 0

    def step(self, good: bool) -> None:
        """Say whether a step was good."""
        if good and self.cost < self.first:
            self.back += 1
            if self.back >= self.patience:
                self.cost, self.up, self.down = self.first, 0, 0
        else:
            self.back = 0
        self.up, self.down = (self.up + 1, 0) if good else (0, self.down + 1)
        if self.up >= self.patience:
            self.cost, self.up = self.cost * UP, 0
        if self.down >= self.patience:
            self.cost, self.down = self.cost / DOWN, 0

    def state(self) -> Tensor:
        """(4,) float64: what `put` brings back."""
        return torch.tensor([self.cost, self.back, self.up, self.down], dtype=torch.float64)

    def put(self, state: Tensor) -> None:
        """Stand where `state` was taken."""
        self.cost, *counts = state.tolist()
        self.back, self.up, self.down = (int(count) for count in counts)
