"""What a study comes to: the front, the choice, and what the chosen trial scores on `test`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import cast

from bimask.defences.settings import DefenceConfig
from bimask.files.tensors import load_tensors
from bimask.metrics import Split
from bimask.tasks import Task, defence_of
from study import search
from study.analysis import blind, leave_out
from study.analysis.pareto import ParetoFront, choose, feasible_first
from study.spec.config import StudyConfig
from study.spec.objectives import (
    known_scores,
    mean_of,
    number,
    numbers_in,
    quantities,
    total_violation,
)
from study.spec.suspect import Subject
from study.store import records
from study.store.schema import (
    SCHEMA,
    Measured,
    Point,
    StudySummary,
    TrialRecord,
    VictimBefore,
    VictimScores,
)

SPLITS: tuple[Split, ...] = ("val", "test")


def summarise(
    config: StudyConfig, folder: Path, trials: list[TrialRecord], victims: dict[str, Subject]
) -> StudySummary:
    """Front, hypervolume, chosen trial with its `test` scores; writes best.yaml.

    Args:
        victims: the tuning victims by name, or the suspect: what needs its trigger is left out then.
    """
    complete = sorted((t for t in trials if t["status"] == "COMPLETE"), key=lambda t: t["number"])
    points = [quantities(trial) for trial in complete]
    violations = [total_violation(config.constraints.violations(point)) for point in points]
    competing = feasible_first(violations)
    front = ParetoFront.of([points[i] for i in competing], config.directions)
    before = _over_all(config, {name: asdict(v.scores["val"]) for name, v in victims.items()})
    bound = before[config.task.quality] - config.choose.max_accuracy_drop
    tolerance = config.choose.tolerance
    positions = {
        who: choose(
            points,
            min_clean_accuracy=bound,
            violations=violations,
            by=score,
            tolerance=tolerance,
            quality=config.task.quality,
        )
        for who, score in blind.CHOSEN_BY.items()
        if all(score in point for point in points)  # trials of before there were probes have no risk
    }
    position = positions[config.selection]
    chosen = None if position is None else complete[position]
    papers = [t for t in complete if t["preset"] == search.PAPER]
    whose = chosen and config.defenders.name_of(chosen["parameters"])
    # of several defences the defaults of the chosen one: what the search was worth
    mine = [t for t in papers if whose in (None, config.defenders.name_of(t["parameters"]))]
    paper = next(iter(mine), None)
    on_front = [complete[competing[i]] for i in front.indices]
    qualities = {name: config.task.quality_of(one.scores["val"]) for name, one in victims.items()}
    summary: StudySummary = {
        "schema": SCHEMA,
        "name": config.name,
        "n_trials": len(trials),
        "n_complete": len(complete),
        "n_pruned": sum(t["status"] == "PRUNED" for t in trials),
        "n_failed": sum(t["status"] == "FAILED" for t in trials),
        "n_feasible": sum(violation <= 0 for violation in violations),
        "objectives": config.directions,
        "aggregate": config.aggregate.model_dump(),
        "hypervolume": front.hypervolume(config.reference),
        "reference_point": config.reference,
        "front": [_point(config, t) for t in on_front],
        "selection": blind.compare(
            config.selection,
            complete,
            positions,
            lambda at: _measured(config, folder, complete[at], victims),
        ),
        "chosen": chosen and _measured(config, folder, chosen, victims),
        "paper_defaults": paper and _measured(config, folder, paper, victims),
        "victims": {name: _before(victim) for name, victim in victims.items()},
        "min_clean_accuracy": bound,
    }
    if len(leave_out.attacks_of(config)) > 1:
        summary["leave_one_out"] = leave_out.table(config, complete, qualities)
    if chosen is not None:
        records.write_yaml(
            folder / records.BEST,
            records.settings_content(config, chosen["parameters"])
            | {"study": config.name, "trial": chosen["number"]},
            f"trial {chosen['number']} of study {config.name}\n"
            f"use: python -m bimask purify {_whom(config)} --config THIS_FILE --out CLEANED",
        )
    return summary


def _whom(config: StudyConfig) -> str:
    return "--victim VICTIM" if config.suspect is None else config.suspect.options


def _before(victim: Subject) -> VictimBefore:
    """A victim's own scores."""
    val, test = (cast(VictimScores, asdict(victim.scores[split])) for split in SPLITS)
    return {"digest": victim.spec.digest, "val": val, "test": test}


def _over_all(config: StudyConfig, scores: Mapping[str, Mapping[str, object]]) -> dict[str, float]:
    """The known scores of all victims by the study's rule, from those of each."""
    names = known_scores(next(iter(scores.values())))
    return {
        name: config.aggregate(name, [number(one, name) for one in scores.values()]) for name in names
    }


def _point(config: StudyConfig, trial: TrialRecord) -> Point:
    """A trial as it stands in the summary: its settings, and scores, objectives and risk on val."""
    return {
        "number": trial["number"],
        "parameters": trial["parameters"],
        "val": known_scores(trial),
        "risk": trial.get("risk"),
        "objectives": numbers_in(trial, config.directions),
    }


def _measured(
    config: StudyConfig, folder: Path, trial: TrialRecord, victims: dict[str, Subject]
) -> Measured:
    """A trial with its scores on `test`, measured from its saved masks."""
    settings = config.defence_config(trial["parameters"])
    per_victim = {
        name: _on_test(
            config.task, folder / "trials" / f"{trial['number']:03d}", name, victim, settings
        )
        for name, victim in victims.items()
    }
    overall = _over_all(config, per_victim)
    return {**_point(config, trial), "test": overall, "victims": per_victim}


def _on_test(
    task: Task, folder: Path, name: str, victim: Subject, settings: DefenceConfig
) -> VictimScores:
    """The scores on `test` of what a trial stored, mean over the victim's runs."""
    defence = defence_of(settings)
    splits = victim.load_data()
    again = sorted(folder.glob(f"{name}.*.{defence.stem}.*rs"))
    paths = (folder / f"{name}.{defence.stem}.safetensors", *again)
    models = (defence.restore(victim.model, load_tensors(path), settings) for path in paths)
    sets, before = victim.eval_sets(splits, "test"), victim.scores["test"]
    found = [task.evaluate(model, sets) for model in models]
    return cast(VictimScores, mean_of([asdict(one) | task.derived(one, before) for one in found]))
