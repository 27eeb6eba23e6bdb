"""What is tried next, and what Optuna is told of how it ended. The only file that imports optuna."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
CHECKPOINTS = Path("checkpoints")  # in the study's folder
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
LOCK_SECONDS = 20  # that a SQLite file may be locked by another process


class ParetoSearch(Searcher):
    """Optuna's multi-objective search, a group of Optuna's trials a Tune trial.

    Optuna's storage is written last: a trial is told when its record is on the disk, so what the
    storage calls RUNNING is being run, or is to be gone on with, or has a record of how it ended.

    Args:
        config: the study.
        storage: Optuna's storage URL. A study in it is gone on with: trials that it calls RUNNING come
            first, with their numbers, their parameters and in their groups.
        records: of the trials that have ended, whatever the storage knows of it.
        checkpoints: folder in which each group gets one of its own.
    """

    def __init__(
        self,
        config: StudyConfig,
        storage: str,
        *,
        records: Sequence[Mapping[str, Any]] = (),
        checkpoints: Path = CHECKPOINTS,
    ) -> None:
        super().__init__()
        self.config, self.storage, self.checkpoints = config, storage, checkpoints
        self.given: set[int] = set()
        self.untold: dict[int, list[float] | None] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():  # constant_liar before 5.0, metric names
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study = self._open()
        if len(self.study.directions) != len(OBJECTIVES):
            raise StudyError(f"Optuna's study has directions {self.study.directions}.")
        for record in records:
            self.tell(record)
        self.doubtful = bool(self._trials(TrialState.RUNNING))

    def _open(self) -> optuna.Study:
        """The study in the storage, new or as it was left; its sampler repeats no suggestion."""
        engine = {"connect_args": {"timeout": LOCK_SECONDS}} if "sqlite" in self.storage else {}
        storage = optuna.storages.RDBStorage(self.storage, engine_kwargs=engine)
        study = optuna.create_study(
            storage=storage,
            study_name=self.config.name,
            directions=list(OBJECTIVES.values()),
            load_if_exists=True,
        )
        known = len(study.get_trials(deepcopy=False, states=(*ENDED, TrialState.RUNNING)))
        study.sampler = SAMPLERS[self.config.sampler]((self.config.seed + known) % 2**32)
        if "enqueued" not in study.user_attrs:  # a kill may have come before
            study.set_metric_names(list(OBJECTIVES))  # the axes in dashboards
            first: list[tuple[dict[str, Any], dict[str, str]]] = [({}, {"preset": PAPER})]
            points = first + [(point, {}) for point in self.config.start]
            for point, attributes in points[len(study.trials) :]:
                study.enqueue_trial(point, user_attrs=attributes)
            study.set_user_attr("enqueued", True)
        return study

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        """The space and the objectives are this searcher's own."""
        return True

    def groups_left(self) -> int:
        """At most so many groups are still to be run."""
        open_ = self._open_groups()
        unasked = self.config.trials - len(self._trials(*ENDED)) - sum(map(len, open_))
        return len(open_) + math.ceil(max(0, unasked) / self.config.trials_per_actor)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next group: `number`, `preset` and `parameters` of each of its trials.

        None where the storage does not let us in: Tune asks again.
        """
        try:
            self._tell_untold()
            trials = self._to_run_on() or self._ask()
            members = [self._member(trial, trial_id) for trial in trials]
        except optuna.exceptions.StorageInternalError:
            self.doubtful = True  # what was asked for and did not arrive is RUNNING for nobody
            return None
        if not members:
            return str(Searcher.FINISHED)
        self.given |= {member["number"] for member in members}
        folder = self.checkpoints / f"{members[0]['number']:03d}"
        return {"members": members, "checkpoint": str(folder)}

    def _ask(self) -> list[optuna.Trial]:
        """New trials, a group of them; fewer or none where that is all there is."""
        left = self.config.trials - len(self._trials(*ENDED, TrialState.RUNNING))
        trials: list[optuna.Trial] = []
        for _ in range(min(self.config.trials_per_actor, left)):
            trials.append(self.study.ask())
            trials[-1].set_user_attr("group", trials[0].number)
        return trials

    def _to_run_on(self) -> list[optuna.Trial]:
        """A group that the storage calls RUNNING, and that nobody runs."""
        if not self.doubtful:
            return []
        groups = self._open_groups()
        if not groups:
            self.doubtful = False
            return []
        return [optuna.Trial(self.study, trial._trial_id) for trial in groups[0]]

    def _open_groups(self) -> list[list[optuna.trial.FrozenTrial]]:
        groups: dict[int, list[optuna.trial.FrozenTrial]] = {}
        for trial in self._trials(TrialState.RUNNING):
            if trial.number not in self.given:
                groups.setdefault(trial.user_attrs.get("group", trial.number), []).append(trial)
        return [groups[first] for first in sorted(groups)]

    def _member(self, trial: optuna.Trial, trial_id: str) -> dict[str, Any]:
        """A trial with its parameters: those that it has, the others suggested."""
        preset = trial.user_attrs.get("preset")
        trial.set_user_attr("tune_trial_id", trial_id)
        parameters = published() if preset == PAPER else suggest(self.config.space, trial)
        return {"number": trial.number, "preset": preset, "parameters": parameters}

    def _trials(self, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: the driver tells each member, once its record is on the disk."""

    def tell(self, record: Mapping[str, Any]) -> None:
        """Tell Optuna how a trial ended: COMPLETE with finite values, or FAIL.

        What the storage does not take now, it is told with the next.
        """
        self.untold[record["number"]] = objectives_of(record) if is_complete(record) else None
        with suppress(optuna.exceptions.StorageInternalError):
            self._tell_untold()

    def _tell_untold(self) -> None:
        for number, values in list(self.untold.items()):
            if values is None:
                self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
            else:
                self.study.tell(number, values, skip_if_finished=True)
            del self.untold[number]

    def close(self) -> None:
        """Tell what could not be told before.

        Raises:
            StudyError: the storage takes nothing.
        """
        try:
            self._tell_untold()
        except optuna.exceptions.StorageInternalError as error:
            raise StudyError(
                f"Optuna's storage {self.storage} does not take the ends of {len(self.untold)} "
                f"trial(s) ({error.__cause__}); their records are kept, so resume when it does."
            ) from error

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: Optuna's storage holds the state."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: a study is gone on with from its storage and its records, never from Ray's files."""
        raise NotImplementedError("resume a study with --resume")

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "storage": self.storage}


SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=6, constant_liar=True),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


def is_complete(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a trial that ended with its objectives."""
    return bool(record["status"] == "COMPLETE")


def published() -> dict[str, Any]:
    """The paper's defaults, every setting."""
    return PurifyConfig().model_dump()


def final_reports(result: dict[str, Any] | None) -> dict[int, dict[str, Any]]:
    """Number -> what a group's final report says of that member; empty for any other report."""
    if not result or not result.get("final"):
        return {}
    return {report["number"]: report for report in result.get("members", [])}


def objectives_of(report: Mapping[str, Any] | None) -> list[float] | None:
    """The objectives of a member's report in order, or None where one is missing or not finite."""
    values = [(report or {}).get(name) for name in OBJECTIVES]
    if all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        return [float(v) for v in values if v is not None]
    return None
