"""Parts of a study's settings: its task by name, the worst corner, the choice and its confirmation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    WithJsonSchema,
)

from bimask.tasks import TASKS, Task

Unit = Field(ge=0, le=1)


def _task(given: object) -> object:
    """The task of a name."""
    if isinstance(given, Task) or (isinstance(given, str) and given in TASKS):
        return given if isinstance(given, Task) else TASKS[given]
    raise ValueError(f"there is no task {given!r}; known are {', '.join(TASKS)}")


# in a file its name
NamedTask = Annotated[
    InstanceOf[Task],
    BeforeValidator(_task),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string"}),
]


class WorstCorner(BaseModel):
    """The worst corner that counts for the hypervolume; fixed here, never taken from results. Each task
    adds what it measures."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    attack_success: float | None = Field(None, ge=0, le=1)
    pruned_share: float | None = Field(None, ge=0, le=1)
    risk: float = Field(1.0, ge=0, le=1)
    seconds: float | None = Field(None, gt=0)


class ReferencePoint(WorstCorner):
    """That of classifiers."""

    clean_accuracy: float = Unit
    recovery: float | None = Field(None, ge=0, le=1)


class Choice(BaseModel):
    """How one trial is chosen from the front, on `val`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rule: Literal["least_attack_success"] = "least_attack_success"
    max_accuracy_drop: float = Field(
        0.02, ge=0, le=1, description="of the task's clean quality, against the victims themselves"
    )
    tolerance: float = Field(
        0.0, ge=0, le=1, description="so little above the least counts as equal; the most accurate wins"
    )


class Confirm(BaseModel):
    """How the chosen configuration is confirmed: every victim of the suite purified anew, on `test`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seeds: int = Field(
        5, ge=1, le=1000, description="runs a victim, each with its own seed and clean images"
    )
    paper_seeds: int | None = Field(
        None, ge=0, le=1000, description="of the paper's defaults; null: as many"
    )
