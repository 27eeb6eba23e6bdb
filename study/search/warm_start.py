"""What a study takes over from earlier ones.

The rule: a finished trial of an earlier study counts as measured where nothing that its numbers depend
on has changed: the same victims, fixed settings, seed, repeats and clean images, and parameters that
this study's space has, inside its bounds. A defence's trials count in a study of several as in one of
that defence alone, and the other way round; their parameters get the names that they have here. Its
objectives are made anew from its numbers for each victim, by this study's rule. Of a study that differs
otherwise, only the points of its front that lie in the space are taken, to be tried first and measured
here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bimask.files.bounded import read_yaml
from study.analysis.pareto import ParetoFront
from study.spec import space as spaces
from study.spec.config import StudyConfig, StudyError
from study.spec.defences import Defenders
from study.spec.directions import DIRECTIONS, OBJECTIVES, Direction
from study.spec.objectives import numbers_in, over_victims, quantities
from study.spec.space import Scalar
from study.store.records import STUDY, TRIALS, fitting_together, read_trials
from study.store.schema import TrialRecord
from study.trial.rules import TrialRules


@dataclass(frozen=True)
class Observed:
    """A point of the space with its numbers over all victims."""

    parameters: dict[str, Scalar]
    values: dict[str, float]


@dataclass(frozen=True)
class Earlier:
    """What earlier studies know: finished trials, and points that are worth a try."""

    observed: list[Observed] = field(default_factory=list)
    points: list[dict[str, Scalar]] = field(default_factory=list)


def read_earlier(config: StudyConfig) -> Earlier:
    """Everything that `warm_start_from` names, as the module's rule takes it.

    Raises:
        StudyError: a folder that holds no study.
    """
    found = Earlier()
    for name in config.warm_start_from:
        with fitting_together(Path(name)):
            study, trials = _read(Path(name))
            here, there = config.model_dump(mode="json"), Defenders.of(study)
            known = [(there.name_of(trial["parameters"]), trial) for trial in trials]
            renamed = [(who, _renamed(config, there, trial), trial) for who, trial in known]
            inside = [
                (who, parameters, trial)
                for who, parameters, trial in renamed
                if _in_space(config, parameters)
            ]
            same = {who for who in there if _comparable(study, who) == _comparable(here, who)}
            observed = [
                Observed(own, _values(config, trial)) for who, own, trial in inside if who in same
            ]
            found.observed.extend(one for one in observed if _needed(config) <= set(one.values))
            others = [(own, trial) for who, own, trial in inside if who not in same]
            front = ParetoFront.of([quantities(trial) for _, trial in others], _objectives(study))
            found.points.extend(others[i][0] for i in front.indices)
    return found


def _renamed(config: StudyConfig, there: Defenders, trial: TrialRecord) -> dict[str, Scalar]:
    """The parameters of an earlier study's trial under the names that they have in this one."""
    name = there.name_of(trial["parameters"])
    own = there.own(name, trial["parameters"])
    return config.defenders.parameters(name, own)


def _objectives(study: Mapping[str, Any]) -> dict[str, Direction]:
    return {name: DIRECTIONS[name] for name in study.get("objectives", OBJECTIVES)}


def _needed(config: StudyConfig) -> set[str]:
    """The numbers that objectives and constraints are made of."""
    bounds = config.constraints.model_dump(exclude_none=True)
    return {*config.objectives, *(bound.partition("_")[2] for bound in bounds)}


def _read(folder: Path) -> tuple[Mapping[str, Any], list[TrialRecord]]:
    try:
        study = read_yaml(folder / STUDY)
        if not (folder / TRIALS).is_file():
            raise StudyError(f"{TRIALS} is missing")
        rows = read_trials(folder)
    except (OSError, ValueError, StudyError) as error:
        raise StudyError(
            f"`warm_start_from` names {folder}, which holds no study that can be read ({error}); give "
            "the folder of an earlier one, such as outputs/ims-digits."
        ) from error
    return study, [row for row in rows if row["status"] == "COMPLETE" and row["preset"] is None]


def _comparable(study: Mapping[str, Any], defence: str) -> str:
    """All that the numbers of a victim under this defence depend on, but for the parameters."""
    bounds = {"min_clean_accuracy", "min_map50", "min_attack_success", "weights"}
    victims = [{k: v for k, v in spec.items() if k not in bounds} for spec in study["victims"]]
    suspect = study.get("suspect") or {}
    deciding = {
        "suspect": {k: v for k, v in suspect.items() if k not in ("model", "clean", *bounds)},
        "victims": sorted(json.dumps(spec, sort_keys=True) for spec in victims),
        "defence": defence if defence in Defenders.of(study).names else None,
        "fixed": Defenders.of(study).own(defence, study.get("fixed", {})),
        "seed": study["seed"],
        "repeats": study.get("repeats", 1),
        "clean_images_per_class": study["clean_images_per_class"],
    }
    return json.dumps(deciding, sort_keys=True)


def _in_space(config: StudyConfig, parameters: Mapping[str, Scalar]) -> bool:
    """Whether parameters are those that the space has there, all inside its bounds."""
    active = [name for name, one in config.space.items() if one.active(parameters)]
    return set(active) == set(parameters) and not spaces.start_problems(config.space, [parameters])


def _values(config: StudyConfig, trial: TrialRecord) -> dict[str, float]:
    names = [name for name in DIRECTIONS if name != "seconds"]
    rules = TrialRules.of(config)
    runs = {
        victim: [rules.numbers(numbers_in(scores, names))] for victim, scores in trial["scores"].items()
    }
    return over_victims(config.aggregate, runs, seconds=trial["seconds"])
