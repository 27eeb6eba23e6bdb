"""Backdoor attacks, one paper a file, under one contract (`Attack`)."""

from __future__ import annotations

import inspect
from typing import Any

from bimask.attacks.adaptive_blend import AdaptiveBlend
from bimask.attacks.badnets import BadNets
from bimask.attacks.base import Attack
from bimask.attacks.blended import Blended
from bimask.attacks.bpp import BPP
from bimask.attacks.input_aware import InputAware
from bimask.attacks.label_consistent import LabelConsistent
from bimask.attacks.low_frequency import LowFrequency
from bimask.attacks.roles import PoisonedBatch, PoisonedData, Role, TriggeredData
from bimask.attacks.sig import SIG
from bimask.attacks.ssba import SSBA
from bimask.attacks.wanet import WaNet
from bimask.errors import SettingError

ATTACKS: dict[str, type[Attack]] = {
    "adaptive_blend": AdaptiveBlend,
    "badnets": BadNets,
    "blended": Blended,
    "bpp": BPP,
    "input_aware": InputAware,
    "label_consistent": LabelConsistent,
    "low_frequency": LowFrequency,
    "sig": SIG,
    "ssba": SSBA,
    "wanet": WaNet,
}


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
    "BPP",
    "SIG",
    "SSBA",
    "AdaptiveBlend",
    "Attack",
    "BadNets",
    "Blended",
    "InputAware",
    "LabelConsistent",
    "LowFrequency",
    "PoisonedBatch",
    "PoisonedData",
    "Role",
    "TriggeredData",
    "WaNet",
    "build_attack",
]
