"""What a comparison of defences is: victims by their part, the seconds of each, and its YAML."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bimask.defences import DEFENCES
from bimask.defences.settings import DefenceConfig
from bimask.errors import describe, first_of
from bimask.files.bounded import read_yaml
from bimask.victims import VictimSpec
from study.spec import space as spaces
from study.spec.config import StudyConfig, StudyError
from study.spec.defences import IMS
from study.spec.keys import Choice
from study.spec.space import Scalar

# Ablations of IMS: what is left out -> settings that hold it out of every trial.
ABLATIONS: dict[str, dict[str, Scalar]] = {
    "no_selection": {"learn_selection": False, "initial_selection": 0.0},
    "no_inverse_mask": {"inverse_weight": 0.0},
    "no_inner_problem": {"budget": 1e-6, "step_size": None, "class_triggers": 0.0},
    "no_initialise": {"initialise_rounds": 0},
    "no_minimise": {"minimise_rounds": 0},
    "no_select": {"select_rounds": 0},
    "paper_loss": {"loss_form": "paper"},
    "log_loss": {"loss_form": "log"},
}
Part = Literal["unseen_seed", "held_out", "control"]
MINUTE = 60.0
RUNNING = {"concurrency"}  # how it runs, not what it finds
LATER = (
    "published",
    "profiles",
    "variants",
)  # keys that came later: without them a comparison keeps its digest


class OwnSettings(BaseModel):
    """What a defence's own study says otherwise, under the keys of a study."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fixed: dict[str, Any] = Field(default_factory=dict, description="settings that all trials share")
    space: dict[str, Any] | None = Field(None, description="null: the ranges that the defence declares")
    start: list[dict[str, Any]] = Field(default_factory=list, description="points to try first")
    paper_defaults: bool = Field(True, description="whether trial 0 is the published settings")


class Seeds(BaseModel):
    """Of a victim's training; no seed is both tuned on and judged on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tuning: list[int] = Field([0, 1], min_length=1, max_length=100)
    judged: list[int] = Field([2, 3, 4], min_length=1, max_length=100)
    other_budgets: list[int] | None = Field(
        None, min_length=1, description="those judged at budgets beside the main one; null: all"
    )

    @model_validator(mode="after")
    def _apart(self) -> Seeds:
        if both := sorted(set(self.tuning) & set(self.judged)):
            raise ValueError(f"a seed is tuned on or judged on, but {both[0]} is both")
        if unknown := sorted(set(self.other_budgets or []) - set(self.judged)):
            raise ValueError(f"other_budgets are seeds of `judged`, got {unknown[0]}")
        return self


class ComparisonConfig(BaseModel):
    """A comparison of defences. See search_spaces/comparison_digits.yaml for a commented one.

    Every defence gets a study of its own on the tuning attacks, of the same seconds. Its choice is
    judged, on `test`, on victims that no trial saw: other training seeds of the tuning attacks,
    attacks that are held out, and twins that were never poisoned.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)
    seed: int = Field(0, ge=0, lt=2**32)
    defences: list[str] | Literal["all"] = Field("all", description="names in `bimask.defences`")
    ablations: list[str] = Field(
        default_factory=list, description="of ims, each a row: " + ", ".join(ABLATIONS)
    )
    search_seconds: float = Field(gt=0, description="in trials, of every defence")
    trials: int = Field(1000, ge=1, le=100_000, description="of a defence, at most")
    concurrency: int | None = Field(None, ge=1, description="actors at once; null fills the cluster")
    cpus_per_trial: int = Field(1, ge=1)
    gpus_per_trial: float = Field(0, ge=0)
    trial_timeout: float | None = Field(
        None, gt=0, description="seconds; null: `search_seconds`, and a minute at least"
    )
    clean_images_per_class: int = Field(10, ge=1, description="that a trial has")
    budgets: list[int] = Field([2, 10, 100], min_length=1, max_length=10)
    common: dict[str, Any] = Field(default_factory=dict, description="of all victims")
    published: list[str] = Field(
        default_factory=list, description="defences that are judged at their published settings, too"
    )
    profiles: dict[str, list[str]] = Field(
        default_factory=dict,
        description="defence -> profiles of it, each a row of its own: its study begins with one and "
        "searches the same settings",
    )
    tuning: list[dict[str, Any]] = Field(min_length=1, max_length=50, description="attacks of trials")
    variants: list[dict[str, Any]] = Field(
        default_factory=list,
        max_length=200,
        description="of the tuning attacks, judged beside their unseen seeds: say other rates",
    )
    held_out: list[dict[str, Any]] = Field(
        default_factory=list, max_length=200, description="attacks that no trial sees"
    )
    seeds: Seeds = Seeds()
    aggregate: Literal["worst", "mean"] = "mean"
    choose: Choice = Choice()
    settings: dict[str, OwnSettings] = Field(default_factory=dict, description="by defence")

    @model_validator(mode="after")
    def _known(self) -> ComparisonConfig:
        chosen = [] if self.defences == "all" else list(self.defences)
        for kind, names, known in (
            ("defence", [*chosen, *self.settings, *self.published, *self.profiles], DEFENCES),
            ("ablation", self.ablations, ABLATIONS),
        ):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"there is no {kind} {unknown[0]!r}; known are {', '.join(known)}")
        for name, profiles in self.profiles.items():
            for profile in profiles:
                DEFENCES[name].config.profile_settings(profile)  # refuses one that it does not have
        if self.defences != "all" and not chosen and not self.ablations:
            raise ValueError("there is nothing to compare; list defences, or say all")
        for names in (chosen, self.ablations, self.published, *self.profiles.values()):
            if len(set(names)) < len(names):
                raise ValueError(f"each may be named once, got {', '.join(names)}")
        if sorted(set(self.budgets)) != self.budgets or self.budgets[0] < 1:
            raise ValueError(f"budgets are whole numbers that rise, got {self.budgets}")
        return self

    @property
    def digest(self) -> str:
        """Sixteen hex digits of everything that decides results."""
        deciding = self.model_dump(mode="json", exclude={"name", *RUNNING})
        for name in LATER:
            if not deciding[name]:
                del deciding[name]
        text = json.dumps(deciding, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def main_budget(self) -> int:
        """Images a class at which defences are ranked: the trials' own, or the nearest to it."""
        return min(self.budgets, key=lambda budget: abs(budget - self.clean_images_per_class))

    def specs(self, attacks: list[dict[str, Any]], seeds: list[int]) -> list[VictimSpec]:
        """A victim of each attack and seed."""
        return [
            VictimSpec.model_validate({**self.common, **own, "seed": seed})
            for own in attacks
            for seed in seeds
        ]

    def judged(self, budget: int | None = None) -> dict[Part, list[VictimSpec]]:
        """The victims that a choice is judged on, with that many images a class if it is said."""
        seeds = self.seeds.judged
        if budget not in (None, self.main_budget):
            seeds = self.seeds.other_budgets or seeds
        return {
            "unseen_seed": self.specs([*self.tuning, *self.variants], seeds),
            "held_out": self.specs(self.held_out, seeds),
            "control": self.specs([{"poisoning_rate": 0}], seeds),
        }

    def suite(self) -> dict[str, VictimSpec]:
        """Every victim, those of trials first, by a name for people."""
        specs = self.specs(self.tuning, self.seeds.tuning)
        specs += [spec for part in self.judged().values() for spec in part]
        told = [f"{spec.name}, seed {spec.seed}" for spec in specs]
        often = Counter(told)
        return {
            name if often[name] == 1 else f"{name} ({spec.digest[:6]})": spec
            for name, spec in zip(told, specs, strict=True)
        }

    @property
    def names(self) -> list[str]:
        """The defences, one by one also where all are meant."""
        return list(DEFENCES) if self.defences == "all" else list(self.defences)

    def entries(self) -> list[Entry]:
        """The rows of the comparison."""
        rows = [Entry(name, name, {}) for name in self.names]
        rows += [
            Entry(f"{name}-{profile}", name, {}, profile=profile)
            for name, profiles in self.profiles.items()
            for profile in profiles
        ]
        rows += [Entry(f"{IMS}-{name}", IMS, ABLATIONS[name]) for name in self.ablations]
        return rows + [Entry(f"{name}-published", name, {}, tuned=False) for name in self.published]

    def settings_of(self, entry: Entry, chosen: Mapping[str, Scalar]) -> DefenceConfig:
        """What an entry is judged with.

        Args:
            chosen: of its study; of one that is not tuned nothing.
        """
        if not entry.tuned:
            return DEFENCES[entry.defence].config()
        return self.study_of(entry).defence_config(chosen)

    def study_of(self, entry: Entry) -> StudyConfig:
        """The study that tunes an entry.

        Raises:
            ValueError: its settings do not fit, as of pydantic.
        """
        own = self.settings.get(entry.defence, OwnSettings())
        profile = {} if entry.profile is None else {"profile": entry.profile}
        fixed = {**own.fixed, **profile, **entry.held}
        content: dict[str, Any] = {
            "name": f"{self.name}.{entry.name}",
            "defence": entry.defence,
            "seed": self.seed,
            "trials": self.trials,
            "search_seconds": self.search_seconds,
            "trial_timeout": self.trial_timeout or max(MINUTE, self.search_seconds),
            "concurrency": self.concurrency,
            "cpus_per_trial": self.cpus_per_trial,
            "gpus_per_trial": self.gpus_per_trial,
            "clean_images_per_class": self.clean_images_per_class,
            "victims": [spec.model_dump() for spec in self.specs(self.tuning, self.seeds.tuning)],
            "aggregate": self.aggregate,
            "choose": self.choose.model_dump(),
            "reference_point": {"clean_accuracy": 0.0, "attack_success": 1.0},
            "paper_defaults": own.paper_defaults and not entry.held and entry.profile is None,
            "fixed": fixed,
            "start": [_without(point, entry.held) for point in own.start],
        }
        if own.space is not None:
            content["space"] = _without(own.space, entry.held)
        return StudyConfig.model_validate(content)


@dataclass(frozen=True)
class Entry:
    """A row of a comparison: a defence, one with a profile, an ablation of one, or one at its published
    settings.

    Attributes:
        held: settings that every trial of it has.
        profile: what every trial's other settings are; None is what `settings` says of the defence.
        tuned: whether a study chooses its settings; else the published ones stand.
    """

    name: str
    defence: str
    held: Mapping[str, Scalar]
    tuned: bool = True
    profile: str | None = None


def load_comparison(path: Path, overrides: Mapping[str, object] | None = None) -> ComparisonConfig:
    """Read and check a comparison with all of its studies.

    Raises:
        StudyError: no file, no YAML, or settings that do not fit, all named.
    """
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise StudyError(
            f"Cannot read the comparison {path}: {error}; give a YAML file such as "
            "search_spaces/comparison_digits.yaml."
        ) from error
    if not isinstance(content, dict):
        raise StudyError(f"{path} must hold `key: value` lines, got {type(content).__name__}.")
    try:
        config = ComparisonConfig.model_validate(content | dict(overrides or {}))
        found = [f"{path}: {problem}" for problem in problems_of(config)]
    except ValidationError as error:
        raise StudyError(f"{path}: {describe(error)}") from error
    if found:
        raise StudyError("\n".join(first_of(list(dict.fromkeys(found)))))
    return config


def problems_of(config: ComparisonConfig) -> list[str]:
    """What does not fit together in a comparison, its victims first, then its studies' settings.

    Raises:
        ValidationError: a victim or a study that cannot be.
    """
    judged = [spec for part in config.judged().values() for spec in part]
    if len({spec.digest for spec in judged}) < len(judged):
        return ["the same victim is listed twice, among `tuning`, `variants` and `held_out`."]
    attacks = [*config.tuning, *config.variants, *config.held_out]
    if any(spec.is_control for spec in config.specs(attacks, [0])):
        return ["an attack poisons; clean twins are made of `common` anyway."]
    return [
        f"settings.{entry.defence}.{place}: {problem}"
        for entry in config.entries()
        for place, problem in _problems(config.study_of(entry))
    ]


def _problems(study: StudyConfig) -> list[tuple[str, str]]:
    """What does not fit its defence in a study, by place."""
    return spaces.problems(study.space, study.fixed, study.defenders.problems) + spaces.start_problems(
        study.space, study.start
    )


def _without(named: Mapping[str, Any], held: Mapping[str, Scalar]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if name not in held}
