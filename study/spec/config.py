"""What a study is: its settings, each with its meaning and its bounds."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bimask.defences.settings import DefenceConfig
from bimask.errors import BimaskError, brief
from bimask.nets import is_own
from bimask.tasks import CLASSIFICATION, TASKS, Task
from bimask.victims import VictimSpec
from bimask.victims.suite import MAX_VICTIMS
from study.spec.defences import ALL, IMS, Defenders, complete
from study.spec.directions import DIRECTIONS, Direction
from study.spec.gates import Gates
from study.spec.keys import Choice, Confirm, NamedTask, ReferencePoint, WorstCorner
from study.spec.objectives import Aggregate, Constraints, ObjectiveName
from study.spec.space import Parameter, Scalar
from study.spec.stopping import EarlyStopping
from study.spec.suspect import NAME, SuspectSpec

# How a study runs, not what it finds.
RUNNING = {"concurrency", "trials_per_actor", "retries"}
MOST_TOGETHER = (
    32  # members of a population on a GPU: each launches a twentieth of the kernels of one alone
)
GROUPS = 40  # that `auto` leaves a search to learn from
RUNNING |= {"checkpoint_every", "trial_timeout", "memory_per_trial", "environment_timeout"}
# Keys that came later: a study without them keeps the digest that it had.
LATER = {"held_out", "controls", "confirm", "objectives", "aggregate", "constraints", "repeats"} | {
    "early_stopping",
    "paper_defaults",
    "paper_repeats",
    "warm_start_from",
    "suspect",
    "defence",
    "search_seconds",
    "defences",
    "task",
}
PAPER = "paper"  # the preset of trial 0, the published defaults
# They model the parameters that all trials have: of several defences, `defence` alone.
OF_ONE_DEFENCE = {"gp", "nsga2", "nsga3", "qmc"}


class StudyError(BimaskError):
    """A study cannot be run as asked: one sentence or one line a problem."""


class StudyConfig(BaseModel):
    """A whole study. See search_spaces/ims_digits.yaml for a commented one.

    It is one of classifiers; that of another task is a subclass, in whose words its victims, objectives
    and bounds are (`study.spec.detection`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    seed: int = Field(0, ge=0, lt=2**32)
    task: NamedTask = Field(
        default_factory=lambda: CLASSIFICATION, description=f"one of {', '.join(TASKS)}"
    )
    defence: str | None = Field(
        IMS,
        description="whose settings are searched: a name in `bimask.defences`; null beside `defences`",
    )
    defences: Literal["all"] | list[str] | None = Field(
        None,
        description="in its place: several, of which each trial has one, chosen with its settings; "
        "all: those that can work on the study's nets",
    )
    trials: int = Field(ge=1, le=1_000_000)
    search_seconds: float | None = Field(
        None,
        gt=0,
        description="seconds in trials, all together, after which no new one begins; null: none ends "
        "the search",
    )
    concurrency: int | None = Field(None, ge=1, description="actors at once; null fills the cluster")
    trials_per_actor: int | Literal["auto"] = Field(
        "auto",
        description="trials that one actor runs at once, as a group; auto: 1 on a CPU; on a GPU up to "
        "32, whose kernels are launched at once, in forty groups or more, so that a search learns",
    )
    cpus_per_trial: int = Field(1, ge=1, description="CPUs, and threads, of an actor")
    gpus_per_trial: float = Field(0, ge=0, description="share of a GPU: 0.25 packs four actors")
    retries: int = Field(3, ge=0, description="times a group is run again whose process or node died")
    device: str = Field("auto", description="auto: cuda where a trial has a GPU share, else cpu")
    sampler: Literal["auto", "tpe", "gp", "nsga2", "nsga3", "random", "qmc"] = Field(
        "auto", description="auto: gp or tpe, by what a trial takes"
    )
    selection: Literal["oracle", "blind"] = Field(
        "oracle", description="oracle: by the true trigger on val; blind: by `risk`, from clean images"
    )
    clean_images_per_class: int = Field(10, ge=1, description="what the defender has")
    report_every: int = Field(10, ge=1, description="rounds between two looks at some of `val`")
    checkpoint_every: float = Field(
        60, gt=0, description="seconds of work that a kill may cost; of other defences than ims a run"
    )
    trial_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds; a trial that takes more fails, and one whose pace is far too slow for it "
        "is stopped early; null: 10 times what the slowest took, 10 minutes at least, and a day until "
        "five are complete",
    )
    memory_per_trial: float | None = Field(
        None, gt=0, description="GiB that an actor may take beyond what it holds as a trial begins"
    )
    environment_timeout: float = Field(
        600,
        gt=0,
        description="seconds that a study waits for a full disk or a locked database before it stops",
    )
    victims: list[VictimSpec] = Field(
        max_length=MAX_VICTIMS, description="that trials are scored on, on val"
    )
    suspect: SuspectSpec | None = Field(
        None, description="instead of victims: a model of the user's own, whose trigger nobody knows"
    )
    held_out: list[VictimSpec] = Field(
        default_factory=list,
        max_length=MAX_VICTIMS,
        description="other attacks and seeds, met after the choice alone",
    )
    controls: list[VictimSpec] = Field(
        default_factory=list,
        max_length=MAX_VICTIMS,
        description="without a backdoor, to see what the defence costs them",
    )
    confirm: Confirm | None = Field(None, description="null: five seeds where there is a suite")
    objectives: list[ObjectiveName] = Field(["clean_accuracy", "attack_success"], min_length=2)
    aggregate: Aggregate = Field(Aggregate(), description="one number from those of all victims")
    constraints: Constraints = Constraints()
    repeats: int = Field(
        1, ge=1, le=1000, description="runs a victim in a trial, over seeds and clean images"
    )
    early_stopping: EarlyStopping | None = Field(None, description="null: every trial runs to its end")
    paper_defaults: bool = Field(True, description="whether trial 0 is the paper's defaults")
    paper_repeats: int = Field(
        1, ge=1, description="runs a victim of the paper's defaults, `repeats` at most; they take long"
    )
    warm_start_from: list[str] = Field(
        default_factory=list, max_length=100, description="folders of earlier studies to begin with"
    )
    reference_point: ReferencePoint
    choose: Choice = Choice()
    gates: Gates | None = Field(None, description="what `study.promote` asks for")
    fixed: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Parameter] = Field(min_length=1, max_length=200)
    start: list[dict[str, Scalar]] = Field(
        default_factory=list,
        max_length=10_000,
        description="points of the space to try first, say of earlier studies",
    )

    @model_validator(mode="before")
    @classmethod
    def _blind_objectives(cls, given: Any) -> Any:
        """Of a suspect selection is blind; a blind one searches by what it chooses by, unless told."""
        if isinstance(given, dict) and given.get("suspect") is not None:
            given = {"victims": [], "selection": "blind"} | given
        if isinstance(given, dict) and given.get("selection") == "blind":
            return {"objectives": [cls._own_task().quality, "risk"]} | given
        return given

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """`profile: NAME` in `fixed` stands for that profile's settings; without a `space` that of
        the defence is searched; what is said by defence becomes flat."""
        return complete({"task": cls._own_task().name} | given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _blind_stays_blind(self) -> StudyConfig:
        used = {
            *self.objectives,
            *(name[4:] for name in self.constraints.model_dump(exclude_none=True)),
        }
        if self.task.probe is None and "risk" in self.objectives:
            raise ValueError(f"nothing says the risk of a model of {self.task}; leave `risk` out")
        needing = {name for name, metric in self.task.metrics.items() if metric.needs_trigger}
        if self.selection == "blind" and (seen := sorted(used & needing)):
            raise ValueError(
                f"`selection: blind` may not use {' and '.join(seen)}, which needs the true trigger; "
                "use risk"
            )
        return self

    @model_validator(mode="after")
    def _bounds_are_of_numbers(self) -> StudyConfig:
        if self.constraints.max_pruned_share is not None and (who := _prunes_nothing(self.defenders)):
            raise ValueError(f"{who}, so constraints.max_pruned_share bounds nothing; leave it out")
        return self

    @classmethod
    def _own_task(cls) -> Task:
        """The task of all studies of this class."""
        found = cls.model_fields["task"].get_default(call_default_factory=True)
        assert isinstance(found, Task)
        return found

    @field_validator("task")
    @classmethod
    def _of_this_task(cls, task: Task) -> Task:
        if task is not cls._own_task():
            raise ValueError(f"these are settings of {cls._own_task()}, not of {task}")
        return task

    @field_validator("defence")
    @classmethod
    def _known_defence(cls, name: str | None) -> str | None:
        if name is not None and name not in (known := cls._own_task().defences):
            raise ValueError(f"there is no defence {name!r}; known are {', '.join(known)}")
        return name

    @field_validator("defences", mode="before")
    @classmethod
    def _known_defences(cls, given: Any, info: ValidationInfo) -> Any:
        if given is None or given == ALL:
            names: list[Any] = []
        elif isinstance(given, list) and given:
            names = given
        else:
            raise ValueError("give `all`, or a list of defences' names such as [ims, clp]")
        known = cls._own_task().defences
        if unknown := [name for name in names if not isinstance(name, str) or name not in known]:
            raise ValueError(f"there is no defence {unknown[0]!r}; known are {', '.join(known)}")
        if len(set(names)) < len(names):
            raise ValueError(f"defences must differ, got {', '.join(names)}")
        if given is not None and info.data.get("defence") is not None:
            raise ValueError("stands beside `defence`; give one of the two")
        return given

    @field_validator("sampler")
    @classmethod
    def _copes_with_conditions(cls, name: str, info: ValidationInfo) -> str:
        if info.data.get("defences") is not None and name in OF_ONE_DEFENCE:
            raise ValueError(
                f"{name} models the parameters that all trials have, and trials of several defences "
                "have `defence` alone in common; take auto, tpe or random"
            )
        return name

    @field_validator("objectives")
    @classmethod
    def _distinct(cls, names: list[str], info: ValidationInfo) -> list[str]:
        who = _prunes_nothing(Defenders.of(info.data))
        if "pruned_share" in names and who:
            raise ValueError(f"{who}, so pruned_share cannot be an objective")
        if len(set(names)) < len(names):
            raise ValueError(f"objectives must differ, got {', '.join(names)}")
        return names

    @field_validator("trials_per_actor", mode="before")
    @classmethod
    def _some_trials(cls, given: Any) -> Any:
        if given == "auto" or (isinstance(given, int) and given >= 1):
            return given
        raise ValueError(f"a whole number from 1 on, or auto, is expected, got {brief(given)}")

    @field_validator("reference_point")
    @classmethod
    def _one_for_each(cls, point: WorstCorner, info: ValidationInfo) -> WorstCorner:
        for name in info.data.get("objectives", []):
            if getattr(point, name) is None:
                raise ValueError(f"a value for the objective {name} is missing")
        return point

    @property
    def digest(self) -> str:
        """Sixteen hex digits of everything that decides results; how much runs at once, how often it is
        kept, what it may take and the gates do not."""
        deciding = self.model_dump(mode="json", exclude={"name", "gates", *RUNNING})
        for name in LATER:
            default = StudyConfig.model_fields[name].get_default(call_default_factory=True)
            if getattr(self, name) == default:
                del deciding[name]
        if not self.choose.tolerance:
            del deciding["choose"]["tolerance"]  # it came later, too
        deciding["reference_point"] = self.reference
        text = json.dumps(deciding, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def directions(self) -> dict[str, Direction]:
        """The objectives in order, with the direction of each."""
        return {name: DIRECTIONS[name] for name in self.objectives}

    @property
    def reference(self) -> dict[str, float]:
        """The reference point of these objectives."""
        return {name: getattr(self.reference_point, name) for name in self.objectives}

    @property
    def confirmation(self) -> Confirm | None:
        """What is asked for, or goes without saying where there is a suite."""
        return self.confirm or (Confirm() if self.held_out or self.controls else None)

    @property
    def device_of_a_trial(self) -> str:
        """The device's name where a trial runs."""
        if self.device != "auto":
            return self.device
        return "cuda" if self.gpus_per_trial else "cpu"

    @property
    def group_size(self) -> int:
        """How many trials one actor runs at once."""
        if self.trials_per_actor != "auto":
            return self.trials_per_actor
        on_gpu = self.device_of_a_trial != "cpu"
        return min(MOST_TOGETHER, max(1, self.trials // GROUPS)) if on_gpu else 1

    @property
    def groups(self) -> int:
        """How many groups of trials there are; the last may be smaller."""
        return math.ceil(self.trials / self.group_size)

    @property
    def suite(self) -> list[VictimSpec]:
        """All victims: those that trials see, then held-out ones, then controls."""
        return [*self.victims, *self.held_out, *self.controls]

    @property
    def resuming(self) -> list[str]:
        """The words of `study.launch` that go on with it; code that a folder names is trusted anew."""
        nets = [one.net for one in ([self.suspect] if self.suspect else self.suite)]
        return ["--resume", self.name, *(["--trust-code"] if any(map(is_own, nets)) else [])]

    def suite_names(self) -> list[str]:
        """One distinct name a victim of `suite`: its own, with its digest where that is not enough; or
        the suspect's alone."""
        if self.suspect is not None:
            return [NAME]
        names = [spec.name for spec in self.suite]
        often = Counter(names)
        return [
            name if often[name] == 1 else f"{name}-{spec.digest[:6]}"
            for name, spec in zip(names, self.suite, strict=True)
        ]

    def victim_names(self) -> list[str]:
        """The names of those that trials see."""
        return self.suite_names()[: len(self.victims) or 1]

    def repeats_of(self, preset: str | None) -> int:
        """Runs a victim in a trial of that preset, `PAPER` or another."""
        return min(self.repeats, self.paper_repeats) if preset == PAPER else self.repeats

    def may_use(self, setting: str) -> bool:
        """Whether any trial may have it, under its name in the study, other than off."""
        points = [self.fixed, *self.start]
        return setting in self.space or any(point.get(setting) for point in points)

    @property
    def defenders(self) -> Defenders:
        """The defences whose settings are searched, one or several."""
        return Defenders.of(
            {"task": self.task.name, "defence": self.defence, "defences": self.defences}
        )

    def defence_config(self, parameters: Mapping[str, Scalar]) -> DefenceConfig:
        """The defence's settings in a trial: fixed ones, then its own, which are all in the paper's."""
        return self.defenders.settings(self.fixed, parameters)


def _prunes_nothing(defenders: Defenders) -> str:
    """Who prunes nothing, as the subject and verb of a sentence; "" where any of them prunes."""
    names = defenders.lacking("pruned_share")
    if len(names) < len(defenders.names):
        return ""
    return f"{' and '.join(names)} prune{'s' if len(names) == 1 else ''} nothing"
