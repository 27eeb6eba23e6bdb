"""Devices by name, and small numbers on their way to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bimask.errors import SettingError


def resolve_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda", "cuda:1", "mps" -> a device that is here.

    Raises:
        SettingError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(
            f"The device {name!r} cannot be used here ({reason}); use 'auto', 'cpu' or a GPU that "
            "this machine has."
        ) from error
    return device


def moved(values: Any, device: torch.device | str) -> Any:
    """Tensors, or lists, tuples and dicts of them, on another device; what is no tensor stays."""
    return tree_map_only(Tensor, lambda one: one.to(device), values)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16: a CPU that emulates it takes ten times float32's time."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        known = torch.backends.mkldnn.is_available()
        return known and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU that this process may have, all of it or what
    `torch.cuda.set_per_process_memory_fraction` leaves; None where the device does not say."""
    if device.type != "cuda":
        return None
    share = torch.cuda.get_per_process_memory_fraction(device)
    return int(share * torch.cuda.get_device_properties(device).total_memory)


def upload(values: float | Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """Host numbers as a tensor where `like` lives; the host does not wait for an accelerator.

    Floats take the dtype of `like`; a tensor keeps its own.
    """
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=like.dtype)
    if like.device.type == "cuda":
        host = host.pin_memory()
    return host.to(like.device, non_blocking=True)
