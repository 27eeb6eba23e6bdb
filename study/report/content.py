"""What the page says, as plain data, from the records of a study alone: no model, no Ray, no MLflow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import pandas as pd
from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict

from bimask.defences.settings import DefenceConfig
from bimask.files.bounded import read_yaml
from bimask.metrics import Split
from bimask.tasks import Task, task_named
from study.analysis.importance import importances
from study.analysis.pareto import ParetoFront
from study.report.headline import RISK, Headline, headline, scores_before
from study.spec.config import PAPER, StudyError
from study.spec.defences import KEY, Defenders
from study.spec.directions import DIRECTIONS, OBJECTIVES, SCORES, Direction
from study.spec.objectives import (
    Spread,
    known_scores,
    numbers_in,
    quantities,
)
from study.spec.space import Parameter
from study.store import records
from study.store.schema import (
    Confirmation,
    LeaveOneOut,
    Parameters,
    Passes,
    Seconds,
    StudySummary,
    TrialRecord,
    TrialStatus,
    VictimScores,
)

COMPLETE: Final = "COMPLETE"
NEEDED = ("name", "victims", "fixed", "space")  # of a study's YAML, resolved
SHOWN = (*SCORES, RISK, "pruned_share")


@dataclass(frozen=True)
class Finished:
    """What a study's folder says.

    Attributes:
        study: its YAML, resolved when it began.
        trials: their records, by number.
        summary: None where the study was cut off.
    """

    study: Mapping[str, Any]
    trials: list[TrialRecord]
    summary: StudySummary | None


class TrialOnPage(TypedDict):
    """What the page needs of a trial, and each of `SHOWN` that is known of it by its name; of the
    paper's defaults no parameters, they are not searched."""

    number: int
    status: TrialStatus
    preset: str | None
    defence: NotRequired[str]
    parameters: Parameters
    seconds: float | None
    reason: NotRequired[str | None]
    spread: NotRequired[dict[str, Spread]]
    scores: NotRequired[dict[str, dict[str, float]]]
    rounds: NotRequired[int]
    passes: NotRequired[Passes]


class VictimOnPage(TypedDict):
    """A victim with its own scores on both splits; None in a study that was cut off."""

    name: str
    before: dict[Split, VictimScores] | None


class BlindOnPage(TypedDict):
    """Risk by trial, mean over the victims; its rank correlation with attack success; both choices."""

    risk: dict[int, float]
    spearman: float
    chosen: int | None
    oracle: int | None


class TestedOnPage(TypedDict):
    """A row of the table on test."""

    who: str
    number: NotRequired[int]
    victims: Mapping[str, VictimScores]


class Cost(TypedDict):
    """What the complete trials took."""

    seconds: Seconds | None
    forward: int
    backward: int
    devices: list[str]


class MetricOnPage(TypedDict):
    """A score: its names, which inputs it counts, and whether "high" or "low" is good."""

    name: str
    short: str
    counts: str
    good: str


class PageContent(TypedDict):
    """Everything on the page but the close-ups of single trials."""

    name: str
    headline: Headline
    defences: list[str]
    victims: list[VictimOnPage]
    parameters: list[Mapping[str, object]]
    objectives: dict[str, Direction]
    left: str
    quality: str
    recovered: str
    price: str
    metrics: dict[str, MetricOnPage]
    scores: list[str]
    trials: list[TrialOnPage]
    front: list[int]
    chosen: int | None
    paper: int | None
    before: dict[str, float] | None
    bound: float | None
    hypervolume: float | None
    importance: dict[str, dict[str, float]]
    blind: BlindOnPage | None
    suite: dict[str, Confirmation] | None
    leave_one_out: LeaveOneOut | None
    tested: list[TestedOnPage]
    cost: Cost
    provenance: list[tuple[str, str]]


def read(folder: Path) -> Finished:
    """A study's folder, read.

    Raises:
        StudyError: no study there, or files that cannot be read.
    """
    if not (folder / records.TRIALS).is_file() or not (folder / records.STUDY).is_file():
        raise StudyError(
            f"There is no study in {folder}: it needs {records.STUDY} and {records.TRIALS}; give the "
            "name of a study that was launched, and its --outputs."
        )
    try:
        study = read_yaml(folder / records.STUDY)
        if missing := [key for key in NEEDED if not isinstance(study, dict) or key not in study]:
            raise ValueError(f"{records.STUDY} has no {' and '.join(missing)}")
        trials = sorted(records.read_trials(folder), key=lambda trial: trial["number"])
        ended = (folder / records.SUMMARY).is_file()
        return Finished(study, trials, records.read_summary(folder) if ended else None)
    except (OSError, ValueError, KeyError) as error:
        raise StudyError(f"The study in {folder} cannot be read: {error}.") from error


def page_content(found: Finished) -> PageContent:
    """What the page says of a study."""
    study, trials, summary = found.study, found.trials, found.summary
    complete = [trial for trial in trials if trial["status"] == COMPLETE]
    objectives: dict[str, Direction] = {n: DIRECTIONS[n] for n in study.get("objectives", OBJECTIVES)}
    if summary:
        front = [point["number"] for point in summary["front"]]
    else:
        points = [quantities(trial) for trial in complete]
        front = [complete[i]["number"] for i in ParetoFront.of(points, objectives).indices]
    chosen = summary and summary["chosen"]
    space = TypeAdapter(dict[str, Parameter]).validate_python(study["space"])
    searched = [trial for trial in complete if trial["preset"] != PAPER]
    defenders = Defenders.of(study)
    left = "attack_success" if study.get("suspect") is None else RISK
    task = task_named(study.get("task"))
    shown: dict[str, Direction] = {name: DIRECTIONS[name] for name in (task.quality, left)}
    return {
        "name": study["name"],
        "headline": headline(summary, Counter(trial["status"] for trial in trials), task),
        "defences": list(defenders) if defenders.several else [],
        "victims": _victims(summary, complete),
        "parameters": [{"name": name, **parameter.model_dump()} for name, parameter in space.items()],
        "objectives": objectives,
        "left": left,
        "quality": task.quality,
        "recovered": task.recovered,
        "price": task.price,
        "metrics": _metrics(task),
        "scores": list(task.metrics) if left in task.metrics else list(shown),
        "trials": [_trial(trial, several=defenders.several) for trial in trials],
        "front": front,
        "chosen": chosen and chosen["number"],
        "paper": _paper(summary, trials),
        "before": scores_before(summary, "val"),
        "bound": summary and summary["min_clean_accuracy"],
        "hypervolume": summary and summary["hypervolume"],
        # of several defences `defence` alone is in all trials, and its importance would be all there is
        "importance": {} if defenders.several else importances(space, searched, shown),
        "blind": blind_choice(complete, summary),
        "suite": summary and summary.get("suite"),
        "leave_one_out": summary and summary.get("leave_one_out"),
        "tested": _tested(summary),
        "cost": _cost(trials, summary),
        "provenance": _provenance(study, trials),
    }


def _metrics(task: Task) -> dict[str, MetricOnPage]:
    """How every score of a task is read, and the risk."""
    known: dict[str, MetricOnPage] = {
        name: {
            "name": one.name,
            "short": one.short,
            "counts": one.counts,
            "good": "high" if one.direction == "maximize" else "low",
        }
        for name, one in task.metrics.items()
    }
    followed = "short cuts of the suspect still followed, as far as any were found"
    return {**known, RISK: {"name": "risk", "short": "risk", "counts": followed, "good": "low"}}


def _victims(summary: StudySummary | None, complete: list[TrialRecord]) -> list[VictimOnPage]:
    """Each victim with its own scores; of a study that was cut off only the names."""
    if summary is None:
        return [{"name": name, "before": None} for name in (complete[0]["scores"] if complete else ())]
    return [
        {"name": name, "before": {"val": one["val"], "test": one["test"]}}
        for name, one in summary["victims"].items()
    ]


def _paper(summary: StudySummary | None, trials: Sequence[TrialRecord]) -> int | None:
    """The trial of the paper's defaults; of several defences that of the chosen one's."""
    if summary and summary["paper_defaults"]:
        return summary["paper_defaults"]["number"]
    return next((t["number"] for t in trials if t["preset"] == PAPER), None)


def _trial(trial: TrialRecord, *, several: bool) -> TrialOnPage:
    short: TrialOnPage = {
        "number": trial["number"],
        "status": trial["status"],
        "preset": trial["preset"],
        "parameters": {} if trial["preset"] == PAPER else trial["parameters"],
        "seconds": trial.get("seconds"),
    }
    if several:
        short["defence"] = str(trial["parameters"][KEY])
    if trial["status"] != COMPLETE:
        return {**short, "reason": trial["reason"]}
    short |= cast(TrialOnPage, numbers_in(trial, SHOWN))
    if "spread" in trial:
        short["spread"] = trial["spread"]
    short["scores"] = {victim: known_scores(scores) for victim, scores in trial["scores"].items()}
    return {**short, "rounds": trial["rounds"], "passes": trial["passes"]}


def settings_of(study: Mapping[str, Any], trial: TrialRecord) -> DefenceConfig:
    """All settings of the defence in a trial."""
    fixed = {} if trial["preset"] == PAPER else study["fixed"]
    return Defenders.of(study).settings(fixed, trial["parameters"])


def _tested(summary: StudySummary | None) -> list[TestedOnPage]:
    """The victims as they were, the paper's defaults, the chosen trial."""
    if summary is None or not summary["victims"] or not summary["chosen"]:
        return []
    before = {name: victim["test"] for name, victim in summary["victims"].items()}
    rows: list[TestedOnPage] = [{"who": "before", "victims": before}]
    for trial, who in ((summary["paper_defaults"], "paper's defaults"), (summary["chosen"], "chosen")):
        if trial:
            rows.append({"who": who, "number": trial["number"], "victims": trial["victims"]})
    return rows


def blind_choice(complete: Sequence[TrialRecord], summary: StudySummary | None) -> BlindOnPage | None:
    """What was known of each trial without the attack, beside what is true; None where nothing was."""
    evidence = {
        trial["number"]: [scores[RISK] for scores in trial["scores"].values() if RISK in scores]
        for trial in complete
    }
    asked = all(len(evidence[trial["number"]]) == len(trial["scores"]) for trial in complete)
    if not complete or not asked or not all("attack_success" in trial for trial in complete):
        return None
    risk = pd.Series({number: sum(values) / len(values) for number, values in evidence.items()})
    true = pd.Series({trial["number"]: trial["attack_success"] for trial in complete})
    blind = summary and summary["selection"]["blind"]
    oracle = summary and (summary["selection"]["oracle"] or summary["chosen"])
    correlation = risk.rank().corr(true.rank())  # Spearman's, ties at their mean rank
    return {
        "risk": risk.to_dict(),
        "spearman": float(correlation),
        "chosen": blind and blind["number"],
        "oracle": oracle and oracle["number"],
    }


def _cost(trials: Sequence[TrialRecord], summary: StudySummary | None) -> Cost:
    passes = [t["passes"] for t in trials if t["status"] == COMPLETE]
    return {
        "seconds": summary and summary.get("seconds"),
        "forward": sum(p["forward"] for p in passes),
        "backward": sum(p["backward"] for p in passes),
        "devices": sorted({t["device"] for t in trials if t.get("device")}),
    }


def _provenance(study: Mapping[str, Any], trials: list[TrialRecord]) -> list[tuple[str, str]]:
    """Name -> value, as the records have it; versions that differ between trials are all shown."""
    found: dict[str, list[str]] = {}

    def add(name: str, value: object) -> None:
        seen = found.setdefault(name, [])
        if str(value) not in seen:
            seen.append(str(value))

    for key in ("seed", "sampler", "selection", "clean_images_per_class"):
        if key in study:
            add(key.replace("_", " "), study[key])
    for trial in trials:
        origin = trial["provenance"]
        add("commit", origin["commit"])
        add("study digest", origin["study"])
        for name, digest in origin["victims"].items():
            add(f"victim {name}", digest)
        for package, installed in origin["versions"].items():
            add(package, installed)
    return [(name, ", ".join(values)) for name, values in found.items()]
