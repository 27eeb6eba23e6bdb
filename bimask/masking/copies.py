"""Copies of models that may keep tensors computed with gradients, which `copy.deepcopy` refuses."""

from __future__ import annotations

import copy

from torch import Tensor, nn


def computed(model: nn.Module) -> list[Tensor]:
    """Tensors that modules hold beside their parameters, with what they were computed from: pruned or
    normalised weights, features of the last pass."""
    held = [value for module in model.modules() for value in vars(module).values()]
    return [value for value in held if isinstance(value, Tensor) and not value.is_leaf]


def copied(model: nn.Module) -> nn.Module:
    """A copy in which computed tensors are numbers alone."""
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed(model)})
