"""What is tried next, and what Optuna is told of how it ended. The only file that imports optuna."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState
from ray.tune.search import Searcher

from bimask.config import PurifyConfig
from study.config import StudyConfig, StudyError
from study.judge import Judge
from study.space import Scalar, suggest
from study.stopping import Standings
from study.warm_start import Earlier

PAPER = "paper"  # the preset of trial 0


class ParetoSearch(Searcher):
    """Optuna's multi-objective search, a group of Optuna's trials a Tune trial.

    Args:
        config: the study.
        storage: Optuna's storage URL, None for one in memory; the study in it must be new.
        earlier: what earlier studies know.
    """

    def __init__(
        self, config: StudyConfig, storage: str | None, earlier: Earlier | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.storage = storage
        self.asked: dict[str, list[optuna.Trial]] = {}
        self.told_last: list[tuple[optuna.Trial, list[float]]] = []
        self.judge = Judge.of(config)
        self.standings = Standings(config.early_stopping)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():  # samplers and metric names that may still change
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study = optuna.create_study(
                storage=storage,
                study_name=config.name,
                directions=list(config.directions.values()),
                sampler=SAMPLERS[config.sampler](config.seed),
            )
            self.study.set_metric_names(list(config.directions))  # the axes in dashboards
        if len(self.study.directions) != len(config.directions):
            raise StudyError(f"Optuna's study has directions {self.study.directions}.")
        if config.paper_defaults:
            self.study.enqueue_trial({}, user_attrs={"preset": PAPER})
        for point in [*config.start, *(earlier.points if earlier else [])]:
            self.study.enqueue_trial(point)
        for observed in earlier.observed if earlier else []:
            self._add(observed.parameters, observed.values)

    def _add(self, parameters: dict[str, Scalar], values: dict[str, float]) -> None:
        """Give Optuna a finished trial of an earlier study; it takes a number, and no trial of this."""
        known = _Known(parameters)
        suggest(self.config.space, known)
        violations = self.judge.constraints.violations(values)
        self.study.add_trial(
            optuna.trial.create_trial(
                params=parameters,
                distributions=known.distributions,
                values=[values[name] for name in self.config.directions],
                constraints=violations,
                user_attrs={"preset": "earlier"},
            )
        )
        self.standings.finished(self.judge.losses(values), violations)

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        """The space and the objectives are this searcher's own."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The next group: `number`, `preset` and `parameters` of each of its trials, and its rivals."""
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
        return {"members": members, "rivals": self.standings.rivals().as_dict()}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna of each member: COMPLETE with finite values of a final report, PRUNED or FAIL."""
        reports = {} if error else final_reports(result)
        for trial in self.asked[trial_id]:
            report = reports.get(trial.number, {})
            values = objectives_of(report, self.config.objectives)
            for where, losses in report.get("rungs", {}).items():
                self.standings.passed(where, losses)
            if report.get("stopped"):
                self.study.tell(trial, state=TrialState.PRUNED)
            elif values is None:
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                self._complete(trial, values, report)

    def _complete(self, trial: optuna.Trial, values: list[float], report: dict[str, Any]) -> None:
        violations = self.judge.constraints.violations(report)
        self.standings.finished(self.judge.losses(report), violations)
        for bound, excess in violations.items():
            trial.set_constraint(bound, excess)
        if trial.params:
            self.study.tell(trial, values)
        else:
            self.told_last.append((trial, values))

    def close(self) -> list[int]:
        """Fail what is still RUNNING, and say which numbers those were.

        The paper's trial is told of here: a finished trial without parameters would leave nothing of
        the space that GP, NSGA and QMC take to be what all finished trials have in common.
        """
        for trial, values in self.told_last:
            self.study.tell(trial, values)
        self.told_last.clear()
        open_ = [t for t in self.study.get_trials() if t.state == TrialState.RUNNING]
        for left in open_:
            self.study.tell(left.number, state=TrialState.FAIL)
        return [left.number for left in open_]

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: Optuna's storage holds the state, each trial with its Tune id."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: a study that was cut short is started anew."""
        raise NotImplementedError("a study cannot be resumed")

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "storage": self.storage}


class _Known:
    """Answers with given values, and notes what they were asked from."""

    def __init__(self, values: dict[str, Scalar]) -> None:
        self.values = values
        self.distributions: dict[str, BaseDistribution] = {}

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        self.distributions[name] = FloatDistribution(low, high, log=log)
        return self.values[name]  # type: ignore[return-value]

    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> int:
        self.distributions[name] = IntDistribution(low, high, log=log)
        return self.values[name]  # type: ignore[return-value]

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Scalar:
        self.distributions[name] = CategoricalDistribution(choices)
        return self.values[name]


# A population of 20 and not of Optuna's 50: a study of 100 trials has then some generations.
SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=6, constant_liar=True),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed, population_size=20),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "qmc": lambda seed: optuna.samplers.QMCSampler(
        seed=seed, scramble=True, warn_independent_sampling=False
    ),
}


def published() -> dict[str, Any]:
    """The paper's defaults, every setting."""
    return PurifyConfig().model_dump()


def final_reports(result: dict[str, Any] | None) -> dict[int, dict[str, Any]]:
    """Number -> what a group's final report says of that member; empty for any other report."""
    if not result or not result.get("final"):
        return {}
    return {report["number"]: report for report in result.get("members", [])}


def objectives_of(report: dict[str, Any] | None, names: Sequence[str]) -> list[float] | None:
    """The objectives of a member's report in order, or None where one is missing or not finite."""
    values = [(report or {}).get(name) for name in names]
    if all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        return [float(v) for v in values if v is not None]
    return None


def first_points(
    config: StudyConfig, count: int, earlier: Earlier | None = None
) -> list[dict[str, Any]]:
    """What the first `count` trials of a study would be, while none has ended; nothing is written."""
    searcher = ParetoSearch(config.model_copy(update={"trials_per_actor": 1}), None, earlier)
    count = min(count, config.trials)
    return [searcher.suggest(str(number))["members"][0] for number in range(count)]
