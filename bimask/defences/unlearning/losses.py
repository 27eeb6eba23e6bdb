"""Losses that several methods of this room share."""

from __future__ import annotations

import torch
from torch import Tensor


def minus_log_other(logits: Tensor, labels: Tensor) -> Tensor:
    """-log(1 - p_label) of each row of logits (N, K): (N,), exact where p is close to 1."""
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return logits.logsumexp(1) - others
