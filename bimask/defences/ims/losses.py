"""The cost of selected channels. The losses on answers are in `bimask.metrics.agreement`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def selection_cost(selections: Sequence[Tensor]) -> Tensor:
    """mean of |1 - s| over all channels: pushes s towards 1, towards few selected channels.

    Two published details matter. The absolute value, although s <= 1: it has no gradient at s = 1,
    where every selection starts; without it the cost holds most selections there. And the sum over
    the layers is kept in float32, also where all else is float64.

    Args:
        selections: s of every site, (..., C_site) each, in [0, 1].

    Returns:
        (...), a scalar for vectors; in [0, 1], float32.
    """
    first = selections[0]
    total = torch.zeros(first.shape[:-1], device=first.device)
    for selection in selections:
        total.add_((1 - selection).abs().sum(-1))
    return total / sum(selection.shape[-1] for selection in selections)
