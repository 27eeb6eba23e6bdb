"""What is tried next, and what Optuna is told of how it ended. The only file that imports optuna."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from bimask.config import PurifyConfig
from study.config import StudyConfig, StudyError
from study.pareto import OBJECTIVES
from study.space import suggest

PAPER = "paper"  # the preset of trial 0


class ParetoSearch(Searcher):
    """Optuna's multi-objective search, a group of Optuna's trials a Tune trial.

    Args:
        config: the study.
        storage: Optuna's storage URL; the study in it must be new.
    """

    def __init__(self, config: StudyConfig, storage: str) -> None:
        super().__init__()
        self.config = config
        self.storage = storage
        self.asked: dict[str, list[optuna.Trial]] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():  # constant_liar before 5.0, metric names
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study = optuna.create_study(
                storage=storage,
                study_name=config.name,
                directions=list(OBJECTIVES.values()),
                sampler=SAMPLERS[config.sampler](config.seed),
            )
            self.study.set_metric_names(list(OBJECTIVES))  # the axes in dashboards
        if len(self.study.directions) != len(OBJECTIVES):
            raise StudyError(f"Optuna's study has directions {self.study.directions}.")
        self.study.enqueue_trial({}, user_attrs={"preset": PAPER})
        for point in config.start:
            self.study.enqueue_trial(point)

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        """The space and the objectives are this searcher's own."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The next group: `number`, `preset` and `parameters` of each of its trials."""
        left = self.config.trials - sum(map(len, self.asked.values()))
        group = self.asked[trial_id] = []
        members = []
        for _ in range(min(self.config.trials_per_actor, left)):
            trial = self.study.ask()
            group.append(trial)
            preset = trial.user_attrs.get("preset")
            trial.set_user_attr("tune_trial_id", trial_id)
            parameters = published() if preset == PAPER else suggest(self.config.space, trial)
            members.append({"number": trial.number, "preset": preset, "parameters": parameters})
        return {"members": members}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna of each member: COMPLETE with finite values of a final report, or FAIL."""
        reports = {} if error else final_reports(result)
        for trial in self.asked[trial_id]:
            values = objectives_of(reports.get(trial.number))
            if values is None:
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                self.study.tell(trial, values)

    def close(self) -> list[int]:
        """Fail what is still RUNNING, and say which numbers those were."""
        open_ = [t for t in self.study.get_trials() if t.state == TrialState.RUNNING]
        for trial in open_:
            self.study.tell(trial.number, state=TrialState.FAIL)
        return [trial.number for trial in open_]

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: Optuna's storage holds the state, each trial with its Tune id."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: a study that was cut short is started anew."""
        raise NotImplementedError("a study cannot be resumed")

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "storage": self.storage}


SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=6, constant_liar=True),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


def published() -> dict[str, Any]:
    """The paper's defaults, every setting."""
    return PurifyConfig().model_dump()


def final_reports(result: dict[str, Any] | None) -> dict[int, dict[str, Any]]:
    """Number -> what a group's final report says of that member; empty for any other report."""
    if not result or not result.get("final"):
        return {}
    return {report["number"]: report for report in result.get("members", [])}


def objectives_of(report: dict[str, Any] | None) -> list[float] | None:
    """The objectives of a member's report in order, or None where one is missing or not finite."""
    values = [(report or {}).get(name) for name in OBJECTIVES]
    if all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        return [float(v) for v in values if v is not None]
    return None
