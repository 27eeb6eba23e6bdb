"""Repair one detector with one configuration, whose type names the defence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bimask.defences.base import DefenceResult, StepLog
from bimask.defences.settings import DefenceConfig
from bimask.detection.defences import DEFENCES
from bimask.detection.defences.base import DetectorDefence, Pictures
from bimask.detection.nets.detector import Detector
from bimask.detection.objects import DetectionData
from bimask.errors import NonFiniteError, SettingError


def defence_of(config: DefenceConfig) -> DetectorDefence[Any]:
    """The defence whose settings these are.

    Raises:
        SettingError: of none in `DEFENCES`.
    """
    for defence in DEFENCES.values():
        if type(config) is defence.config:
            return defence
    known = ", ".join(defence.config.__name__ for defence in DEFENCES.values())
    raise SettingError(
        f"A {type(config).__name__} is of no defence of detectors; settings are {known}."
    )


def purify(
    detector: Detector,
    clean: DetectionData,
    config: DefenceConfig | None = None,
    *,
    generator: torch.Generator | None = None,
    on_step: Callable[[StepLog], None] | None = None,
) -> DefenceResult:
    """Take the backdoor out of a detector.

    Args:
        detector: the suspect, on the device of the pictures; left as it is.
        clean: pictures with their objects.
        config: settings of a defence in `DEFENCES`; None is `soft_branch` as it is.
        generator: CPU; None is one of seed 0.
        on_step: called after every step.

    Raises:
        ModelError: a detector that the defence can do nothing for.
        SettingError: the settings are of no defence of detectors.
        NonFiniteError: a loss is NaN or infinite.
    """
    settings = next(iter(DEFENCES.values())).config() if config is None else config
    defence = defence_of(settings)
    defence.check(detector, clean.images)
    (result,) = defence.run(
        detector,
        Pictures(clean.floats(), clean.targets),  # type: ignore[arg-type]
        [settings],
        generators=[generator or torch.Generator().manual_seed(0)],
        on_step=None if on_step is None else lambda _member, log, _current: on_step(log),
    )
    if isinstance(result, NonFiniteError):
        raise result
    return result
