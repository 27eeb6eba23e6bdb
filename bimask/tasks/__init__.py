"""What backdoors are taken out of: classifiers, or detectors.

A study knows its task by this alone. What a task leaves out is None in it, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from bimask.defences.base import CleanData, Defence, DefenceResult
from bimask.defences.settings import DefenceConfig
from bimask.errors import NonFiniteError, SettingError
from bimask.files.atomic import parsed_manifest
from bimask.nets.cleaned import MANIFEST
from bimask.tasks.base import Direction, Metric, Predictor, Probe, Task
from bimask.tasks.classifiers import Classification
from bimask.tasks.detectors import Detection

__all__ = [
    "CLASSIFICATION",
    "DETECTION",
    "TASKS",
    "Direction",
    "Metric",
    "Predictor",
    "Probe",
    "Task",
    "defence_of",
    "defend",
    "load_predictor",
    "task_named",
    "task_of",
]

CLASSIFICATION, DETECTION = Classification(), Detection()
TASKS: Mapping[str, Task] = MappingProxyType({"classification": CLASSIFICATION, "detection": DETECTION})


def task_named(name: object) -> Task:
    """The task of this name; of an unknown one, or where none is said, that of classifiers."""
    return TASKS.get(name, CLASSIFICATION) if isinstance(name, str) else CLASSIFICATION


def task_of(spec: Any) -> Task:
    """The task of a victim's spec.

    Raises:
        SettingError: it is none's.
    """
    for task in TASKS.values():
        if type(spec) is task.spec:
            return task
    raise SettingError(f"A {type(spec).__name__} is no spec of a victim of any task.")


def load_predictor(folder: Path, *, own_code: bool = False) -> Predictor:
    """What answers in the folder of a cleaned model, of the task that its manifest names.

    Raises:
        VictimError: as of `Task.predictor`.
    """
    try:
        content, _ = parsed_manifest(folder / MANIFEST)
        task = task_named(content.get("task"))
    except (OSError, ValueError, AttributeError):
        task = CLASSIFICATION  # whose own reader says what is wrong
    return task.predictor(folder, own_code=own_code)


def defence_of(config: DefenceConfig) -> Defence[Any]:
    """The defence of any task whose settings these are.

    Raises:
        SettingError: of none.
    """
    for task in TASKS.values():
        for defence in task.defences.values():
            if type(config) is defence.config:
                return defence
    raise SettingError(f"A {type(config).__name__} is of no known defence.")


def defend(
    model: nn.Module,
    images: Any,
    config: DefenceConfig,
    *,
    labels: Any,
    generator: torch.Generator,
) -> DefenceResult:
    """Take the backdoor out of a model of any task.

    Args:
        model: the suspect; left as it is.
        images, labels: clean, as the task's defences take them; labels are handed on only to a defence
            that declares a need of them.
        generator: CPU.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    defence = defence_of(config)
    clean = CleanData(images, labels if defence.needs_labels else None)
    (result,) = defence.run(model, clean, [config], generators=[generator])
    if isinstance(result, NonFiniteError):
        raise result
    return result
