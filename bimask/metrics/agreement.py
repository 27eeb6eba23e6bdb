"""How alike two models answer: the two agreement losses of IMS, pure functions.

Both compare two batches of softmax distributions u, v by their overlap, the dot product
`sum_c u_c v_c` in [0, 1] (Dunnett et al. 2025, equations 4 to 7). Two forms, by name:

    paper   -log(overlap + 1e-8) and -log(1 - overlap + 1e-8), as published. In float32 the second
            flattens at 18.42 and its gradient is wrong by a factor of 3 at a margin of 18.
    log     the same quantities without the 1e-8, in log space: exact to a margin of 1e4.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LossForm = Literal["paper", "log"]

EPSILON = 1e-8  # the published floor inside both logarithms


def agree(u: Tensor, v: Tensor, *, form: LossForm = "paper") -> Tensor:
    """mean over the batch of -log(overlap(u, v)): small where both answer alike.

    Args:
        u, v: logits (..., N, K), any real numbers; leading dimensions are batches of their own.
        form: "paper" or "log", see the module.

    Returns:
        (...), a scalar for (N, K); >= 0. It reaches 0 only where both distributions are one-hot: the
        loss rewards sharpness as well as agreement.
    """
    if form == "paper":
        return -(_overlap(u, v) + EPSILON).log().mean(-1)
    return -torch.logsumexp(u.log_softmax(-1) + v.log_softmax(-1), dim=-1).mean(-1)


def disagree(u: Tensor, v: Tensor, *, form: LossForm = "paper") -> Tensor:
    """mean over the batch of -log(1 - overlap(u, v)): small where the answers differ.

    Args:
        u, v: logits (..., N, K), any real numbers; leading dimensions are batches of their own.
        form: "paper" or "log", see the module.

    Returns:
        (...), a scalar for (N, K); >= 0 ("paper" can undercut 0 by 1e-8).
    """
    if form == "paper":
        return -(1 - _overlap(u, v) + EPSILON).log().mean(-1)
    # 1 - sum_c u_c v_c = sum_c u_c (1 - v_c): a sum of positive terms, nothing cancels.
    return -torch.logsumexp(u.log_softmax(-1) + _log_complement(v), dim=-1).mean(-1)


def _overlap(u: Tensor, v: Tensor) -> Tensor:
    """(..., N, K), (..., N, K) -> (..., N) in [0, 1]."""
    return (u.softmax(-1) * v.softmax(-1)).sum(-1)


def _log_complement(logits: Tensor) -> Tensor:
    """log(1 - softmax(logits)) as the share of all *other* classes: (..., N, K) -> same."""
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    others = logits.unsqueeze(-2).masked_fill(itself, -torch.inf)  # (..., N, K, K)
    return torch.logsumexp(others, dim=-1) - torch.logsumexp(logits, dim=-1, keepdim=True)
