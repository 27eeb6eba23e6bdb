"""A study of detectors: its keys have the names of what is measured there."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from bimask.detection.victims import DetectorSpec
from bimask.tasks import DETECTION
from bimask.victims.suite import MAX_VICTIMS
from study.spec.config import StudyConfig
from study.spec.keys import NamedTask, Unit, WorstCorner
from study.spec.objectives import Bounds

DetectionObjective = Literal[
    "map50", "map", "attack_success", "true_detection", "pruned_share", "seconds", "risk"
]


def _objectives() -> list[DetectionObjective]:
    return ["map50", "attack_success"]


class DetectionPoint(WorstCorner):
    """That of detectors."""

    map50: float = Unit
    map: float | None = Field(None, ge=0, le=1)
    true_detection: float | None = Field(None, ge=0, le=1)


class DetectionConstraints(Bounds):
    """Those of detectors."""

    min_map: float | None = Field(None, ge=0, le=1)
    min_true_detection: float | None = Field(None, ge=0, le=1)


class DetectionStudy(StudyConfig):
    """A study of detectors. See search_spaces/detection_digits.yaml for a commented one."""

    task: NamedTask = Field(default_factory=lambda: DETECTION, description="detection")
    defence: str | None = Field(
        DETECTION.defence,
        description="whose settings are searched: a name in `bimask.detection.DEFENCES`; null beside "
        "`defences`",
    )
    clean_images_per_class: int = Field(
        10, ge=1, description="pictures that the defender has, for each class of the data"
    )
    victims: list[DetectorSpec] = Field(  # type: ignore[assignment]
        min_length=1, max_length=MAX_VICTIMS, description="that trials are scored on, on val"
    )
    suspect: None = Field(None, description="there is none of detectors")
    held_out: list[DetectorSpec] = Field(  # type: ignore[assignment]
        default_factory=list,
        max_length=MAX_VICTIMS,
        description="other attacks and seeds, met after the choice alone",
    )
    controls: list[DetectorSpec] = Field(  # type: ignore[assignment]
        default_factory=list,
        max_length=MAX_VICTIMS,
        description="without a backdoor, to see what the defence costs them",
    )
    objectives: list[DetectionObjective] = Field(  # type: ignore[assignment]
        default_factory=_objectives, min_length=2
    )
    constraints: DetectionConstraints = DetectionConstraints()  # type: ignore[assignment]
    reference_point: DetectionPoint  # type: ignore[assignment]

    @field_validator("suspect", mode="before")
    @classmethod
    def _no_suspect(cls, given: Any) -> Any:
        if given is not None:
            raise ValueError("no detector in doubt can be studied yet; leave it out and list `victims`")
        return given
