"""What one of torch's optimisers remembers, as plain tensors under names; and names below others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers, as PARAMETER.NAME; empty before its first step."""
    return {
        f"{position}.{name}": value
        for position, kept in optimizer.state_dict()["state"].items()
        for name, value in kept.items()
        if isinstance(value, Tensor)
    }


def put_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Make an optimiser of the same parameters remember what `moments_of` gave."""
    kept: dict[int, dict[str, Tensor]] = {}
    for place, value in moments.items():
        position, _, name = place.partition(".")
        kept.setdefault(int(position), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": kept, "param_groups": groups})
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if value.shape == parameter.shape:
                # in the parameter's memory layout: another takes kernels that round otherwise
                own[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as PREFIX.NAME."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `prefixed` named so, under its own names again."""
    start = f"{prefix}."
    return {name.removeprefix(start): v for name, v in tensors.items() if name.startswith(start)}
