"""Backdoor attacks, one paper a file, under one contract (`Attack`)."""

from __future__ import annotations

import inspect
from typing import Any

from bimask.attacks.badnets import BadNets
from bimask.attacks.base import Attack
from bimask.attacks.blended import Blended
from bimask.attacks.roles import PoisonedBatch, PoisonedData, Role, TriggeredData
from bimask.attacks.sig import SIG
from bimask.errors import SettingError

ATTACKS: dict[str, type[Attack]] = {"badnets": BadNets, "blended": Blended, "sig": SIG}


def build_attack(name: str, **settings: Any) -> Attack:
    """The attack `name` of `ATTACKS` with its hyper-parameters.

    Raises:
        SettingError: unknown name or hyper-parameter, or a value out of range.
    """
    if name not in ATTACKS:
        raise SettingError(f"Unknown attack {name!r}; known are {', '.join(sorted(ATTACKS))}.")
    known = [p for p in inspect.signature(ATTACKS[name].__init__).parameters if p != "self"]
    if unknown := sorted(set(settings) - set(known)):
        raise SettingError(
            f"Attack {name!r} has no hyper-parameter {unknown[0]!r}; it has {', '.join(known)}."
        )
    try:
        return ATTACKS[name](**settings)
    except TypeError as error:
        raise SettingError(
            f"Attack {name!r}: a hyper-parameter has the wrong type: {error}."
        ) from error


__all__ = [
    "ATTACKS",
    "SIG",
    "Attack",
    "BadNets",
    "Blended",
    "PoisonedBatch",
    "PoisonedData",
    "Role",
    "TriggeredData",
    "build_attack",
]
