"""What is tried next, and what Optuna is told of how it ended."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from study.search.optuna_door import OptunaDoor
from study.search.samplers import SAMPLERS, STARTUP, WORTH, sampler_of
from study.search.warm_start import Earlier, Observed
from study.spec.config import PAPER, StudyConfig, StudyError
from study.spec.objectives import quantities
from study.spec.space import suggest
from study.store.records import search_is_over
from study.store.schema import Group, Member, MemberReport, Parameters, TrialRecord
from study.trial.history import ParetoHistory
from study.trial.limits import default_timeout
from study.trial.rules import TrialRules

EARLIER = "earlier"  # the preset of an earlier study's trial, which is no trial of this one
CHECKPOINTS = Path("checkpoints")  # in the study's folder
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
LOCK_SECONDS = 5  # that a SQLite file may be locked by another process


class ParetoSearch(Searcher):
    """Optuna's multi-objective search, a group of Optuna's trials a Tune trial.

    Optuna's storage is written last: a trial is told when its record is on the disk, so what the
    storage calls RUNNING is being run, or is to be gone on with, or has a record of how it ended.

    Args:
        config: the study.
        storage: Optuna's storage URL, None for one in memory. A study in it is gone on with: trials
            that it calls RUNNING come first, with their numbers, their parameters, in their groups.
        records: of the trials that have ended, whatever the storage knows of it.
        checkpoints: folder in which each group gets one of its own.
        earlier: what earlier studies know.
        say: told in a sentence what the storage keeps waiting, and which trials have lost their record.
        given_up: whether nobody waits for the storage any longer.

    Attributes:
        lost: trials that the storage knows to have ended, and that have no record: it was lost since.
            They are run again, with their numbers and parameters, and end as they had ended.

    Raises:
        StudyError: the storage cannot be read, does not let us in for `environment_timeout`, or is not
            the one of these records.
    """

    def __init__(
        self,
        config: StudyConfig,
        storage: str | None,
        *,
        records: Sequence[TrialRecord] = (),
        checkpoints: Path = CHECKPOINTS,
        earlier: Earlier | None = None,
        say: Callable[[str], None] = lambda _: None,
        given_up: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self.door = OptunaDoor(storage, config.environment_timeout, say, given_up)
        self.config, self.storage, self.checkpoints = config, storage, checkpoints
        self.given: set[int] = set()
        self.asked: dict[int, optuna.Trial] = {}
        self.untold: dict[int, TrialRecord] = {}
        self.told: list[TrialRecord] = []
        self.seconds: list[float] = []
        # seconds of complete trials, for one run a victim: a defence is no measure of another
        self.took: dict[str, list[float]] = {}
        self.earlier = earlier or Earlier()
        self.rules = TrialRules.of(config)
        self.history = ParetoHistory(config.early_stopping)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():  # samplers and metric names that may still change
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study = self.door.patiently(self._open)
        if len(self.study.directions) != len(config.directions):
            raise StudyError(f"Optuna's study has directions {self.study.directions}.")
        for one in self.earlier.observed:
            violations = self.rules.constraints.violations(one.values)
            self.history.finished(self.rules.losses(one.values), violations)
        known = {record["number"] for record in records}
        self.lost = [t.number for t in self._trials(*ENDED) if t.number not in known]
        if records and max(r["number"] for r in records) >= len(self.study.trials):
            raise StudyError(
                f"{storage} lacks trials that have records; put it back as it was, or start "
                "a new study under another --name."
            )
        for record in records:
            self.tell(record)
        self.doubtful = bool(self.lost or self._trials(TrialState.RUNNING))
        if self.lost:
            numbers = ", ".join(map(str, self.lost))
            say(f"The records of these trials are lost, and they are run again: {numbers}.")

    def _open(self) -> optuna.Study:
        """The study in the storage, new or as it was left; its sampler repeats no suggestion."""
        storage = None
        if self.storage is not None:
            engine = {"connect_args": {"timeout": LOCK_SECONDS}} if "sqlite" in self.storage else {}
            storage = optuna.storages.RDBStorage(self.storage, engine_kwargs=engine)
        study = optuna.create_study(
            storage=storage,
            study_name=self.config.name,
            directions=list(self.config.directions.values()),
            load_if_exists=True,
        )
        known = len(study.get_trials(deepcopy=False, states=(*ENDED, TrialState.RUNNING)))
        if self.config.sampler == "qmc":
            known = 0  # the storage knows the place in its sequence, under the sequence's seed
        self.seed = (self.config.seed + known) % 2**32
        study.sampler = sampler_of(self.config, self.seed)
        if "enqueued" not in study.user_attrs:  # a kill may have come before
            study.set_metric_names(list(self.config.directions))  # the axes in dashboards
            first: list[tuple[Parameters, dict[str, str]]] = []
            if self.config.paper_defaults:
                for name in self.config.defenders:
                    whose = {"defence": name} if self.config.defenders.several else {}
                    first.append(({}, {"preset": PAPER, **whose}))
            points = first + [(point, {}) for point in (*self.config.start, *self.earlier.points)]
            for point, attributes in points[len(study.trials) :]:
                study.enqueue_trial(point, user_attrs=attributes)
            for observed in self.earlier.observed[len(study.trials) - len(points) :]:
                study.add_trial(self._as_trial(observed))
            study.set_user_attr("enqueued", True)
        return study

    def _as_trial(self, one: Observed) -> optuna.trial.FrozenTrial:
        """A finished trial of an earlier study; it takes a number, and is no trial of this one."""
        known = optuna.trial.FixedTrial(one.parameters)
        suggest(self.config.space, known)
        return optuna.trial.create_trial(
            params=one.parameters,
            distributions=known.distributions,
            values=[one.values[name] for name in self.config.directions],
            constraints=self.rules.constraints.violations(one.values),
            user_attrs={"preset": EARLIER},
        )

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        """The space and the objectives are this searcher's own."""
        return True

    def groups_left(self) -> int:
        """At most so many groups are still to be run."""
        unasked = self._unasked()
        return len(self._open_groups()) + math.ceil(max(0, unasked) / self.config.group_size)

    def suggest(self, trial_id: str) -> Group | str | None:
        """The next group: `number`, `preset` and `parameters` of each of its trials, and its rivals.

        None where the storage does not let us in: Tune asks again.
        """
        try:
            self.flush_pending()
            trials = self._to_run_on() or self._ask()
            members = [self._member(trial, trial_id) for trial in trials]
        except optuna.exceptions.StorageInternalError as error:
            self.doubtful = True  # what was asked for and did not arrive is RUNNING for nobody
            self.door.refused(error)
            return None
        self.door.let_in()
        if not members:
            return str(Searcher.FINISHED)
        self.given |= {member["number"] for member in members}
        folder = self.checkpoints / f"{members[0]['number']:03d}"
        rivals = self.history.rivals().sent()
        limit = self._limit(members)
        return {"members": members, "rivals": rivals, "limit": limit, "checkpoint": str(folder)}

    def _limit(self, members: Sequence[Member]) -> float:
        """Seconds that a group has: the study's `trial_timeout` for each, or what others took."""
        if self.config.trial_timeout is not None:
            return self.config.trial_timeout * len(members)
        presets = [member["preset"] for member in members]
        names = [self.config.defenders.name_of(member["parameters"]) for member in members]
        # the paper's defaults may take a hundred times what searched settings do
        known = [[] if PAPER in presets else self.took.get(name, []) for name in names]
        return sum(map(default_timeout, known)) * max(map(self.config.repeats_of, presets))

    def _unasked(self) -> int:
        """How many new trials there may still be."""
        if search_is_over(self.config, self.told):
            return 0
        return self.config.trials - len(self._trials(*ENDED, TrialState.RUNNING))

    def _ask(self) -> list[optuna.Trial]:
        """New trials, a group of them; fewer or none where that is all there is."""
        left = self._unasked()
        trials: list[optuna.Trial] = []
        for _ in range(min(self.config.group_size, left)):
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
        for trial in self._trials(TrialState.RUNNING, *ENDED):
            cut = trial.state == TrialState.RUNNING or trial.number in self.lost
            if cut and trial.number not in self.given:
                groups.setdefault(trial.user_attrs.get("group", trial.number), []).append(trial)
        return [groups[first] for first in sorted(groups)]

    def _member(self, trial: optuna.Trial, trial_id: str) -> Member:
        """A trial with its parameters: those that it has, the others suggested."""
        preset = trial.user_attrs.get("preset")
        self.asked[trial.number] = trial
        source: optuna.trial.BaseTrial = trial
        if trial.number in self.lost:  # it has ended, and takes no more
            source = optuna.trial.FixedTrial(trial.params)
        else:
            trial.set_user_attr("tune_trial_id", trial_id)
        if preset == PAPER:
            parameters = published(self.config, trial.user_attrs.get("defence"))
        else:
            parameters = suggest(self.config.space, source)
        return {"number": trial.number, "preset": preset, "parameters": parameters}

    def _trials(self, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
        found = self.study.get_trials(deepcopy=False, states=states)
        return [trial for trial in found if trial.user_attrs.get("preset") != EARLIER]

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: the driver tells each member, once its record is on the disk."""

    def tell(self, record: TrialRecord) -> None:
        """Tell Optuna how a trial ended: COMPLETE with finite values, PRUNED, or FAIL.

        What the storage does not take now, it is told with the next. Of two kinds it is told when the
        search closes. The paper's trial: a finished trial without parameters would leave nothing of the
        space that GP, NSGA and QMC take to be what all finished trials have in common. A stopped trial,
        where the sampler is GP: that leaves PRUNED trials out, and would propose the like again and
        again; of a RUNNING one it knows that something is being tried there.
        """
        self.given.add(record["number"])
        self.untold[record["number"]] = record
        self.told.append(record)
        for where, losses in record.get("rungs", {}).items():
            self.history.passed(where, losses)
        if is_complete(record):
            values = quantities(record)
            violations = self.rules.constraints.violations(values)
            self.history.finished(self.rules.losses(values), violations)
            seconds = record.get("seconds", 0.0)
            name = self.config.defenders.name_of(record["parameters"])
            took = seconds / self.config.repeats_of(record["preset"])
            self.took.setdefault(name, []).append(took)
            self._settle(seconds)
        try:
            self.flush_pending()
        except optuna.exceptions.StorageInternalError:
            pass  # it is told with the next
        else:
            self.door.let_in()

    def _settle(self, seconds: float) -> None:
        """Under `auto`, leave GP once it is known that trials are too short for it."""
        self.seconds.append(seconds)
        known = self.config.sampler == "auto" and len(self.seconds) == STARTUP
        if known and self._learns_by_gp and statistics.median(self.seconds) < WORTH:
            self.study.sampler = SAMPLERS["tpe"](self.seed)

    @property
    def _learns_by_gp(self) -> bool:
        return isinstance(self.study.sampler, optuna.samplers.GPSampler)

    def flush_pending(self, *, last: bool = False) -> None:
        for number, record in list(self.untold.items()):
            unseen = record["status"] == "PRUNED" and self._learns_by_gp
            if (record["preset"] == PAPER or unseen) and not last:
                continue
            if record["status"] == "PRUNED":
                self.study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
            elif is_complete(record):
                self._bound(number, self.rules.constraints.violations(quantities(record)))
                values = objectives_of(record, self.config.objectives)
                self.study.tell(number, values, skip_if_finished=True)
            else:
                self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
            del self.untold[number]

    def _bound(self, number: int, violations: Mapping[str, float]) -> None:
        """Write down how far a trial is from its bounds, where that is not done yet."""
        if not violations:
            return
        (known,) = [t for t in self._trials(*ENDED, TrialState.RUNNING) if t.number == number]
        if known.state == TrialState.RUNNING:
            trial = self.asked.get(number) or optuna.Trial(self.study, known._trial_id)
            for bound, excess in violations.items():
                if bound not in known.constraints:
                    trial.set_constraint(bound, excess)

    def close(self) -> None:
        """Tell what could not be told before, and what was kept for the end.

        Raises:
            StudyError: the storage takes nothing for `environment_timeout`; the records are kept.
        """
        self.door.patiently(lambda: self.flush_pending(last=True))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: Optuna's storage holds the state."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: a study is gone on with from its storage and its records, never from Ray's files."""
        raise NotImplementedError("resume a study with --resume")

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "storage": self.storage}


def is_complete(record: TrialRecord) -> bool:
    """Whether a record is of a trial that ended with its objectives."""
    return bool(record["status"] == "COMPLETE")


def published(config: StudyConfig, name: str | None = None) -> Parameters:
    """The published defaults of a defence of the study, by default its first: every setting."""
    name = name or config.defenders.names[0]
    return config.defenders.parameters(name, config.task.defences[name].config().model_dump())


def final_reports(result: Mapping[str, Any] | None) -> dict[int, MemberReport]:
    """Number -> what a group's final report says of that member; empty for any other report."""
    if not result or not result.get("final"):
        return {}
    return {report["number"]: report for report in result.get("members", [])}


def objectives_of(report: Mapping[str, object] | None, names: Sequence[str]) -> list[float] | None:
    """The objectives of a member's report in order, or None where one is missing or not finite."""
    values = [(report or {}).get(name) for name in names]
    if all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        return [float(v) for v in values if isinstance(v, int | float)]
    return None


def first_points(config: StudyConfig, count: int, earlier: Earlier | None = None) -> list[Member]:
    """What the first `count` trials of a study would be, while none has ended; nothing is written."""
    searcher = ParetoSearch(config.model_copy(update={"trials_per_actor": 1}), None, earlier=earlier)
    groups = [searcher.suggest(str(number)) for number in range(min(count, config.trials))]
    return [group["members"][0] for group in groups if isinstance(group, dict)]
