"""The driver: groups go out to actors, their ends come in to the recorder."""

from __future__ import annotations

import logging
import re
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune

from study.search import storage as storages
from study.search.actor import trainable, with_bucket, within_limits
from study.search.interrupts import Interrupts
from study.search.liveness import is_gone
from study.search.pareto_search import (
    CHECKPOINTS,
    ParetoSearch,
    final_reports,
    objectives_of,
)
from study.search.warm_start import Earlier
from study.spec.config import StudyConfig
from study.store.schema import FinalReport, Group, MemberReport, StepReport
from study.tracking.recorder import Recorder
from study.trial.cases import Case
from study.trial.limits import too_long, where_it_hung

ERROR = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt)\b")
RAY = "ray"  # Tune's folder in the study's


class _Recording(tune.Callback):
    """Hands Tune's events to the recorder, and what it made of them to Optuna, in the driver."""

    def __init__(self, recorder: Recorder, searcher: ParetoSearch, timeout: float | None) -> None:
        self.recorder: Recorder | None = recorder
        self.searcher: ParetoSearch | None = searcher
        self.timeout = timeout
        self.begun: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.recorder is None:
            return
        self.begun[trial.trial_id] = time.monotonic()
        members = trial.config["members"]
        for member in members:
            if not self.recorder.knows(member["number"]):
                self.recorder.started(**member, group=len(members))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: StepReport | FinalReport, **_: Any
    ) -> None:
        if self.recorder is not None and "final" not in result:
            self.recorder.reported(result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.recorder is None:
            return
        reports = final_reports(trial.last_result)
        for member in trial.config["members"]:
            report: MemberReport = reports.get(member["number"], {"number": member["number"]})
            if "stopped" in report:
                self.recorder.pruned(member["number"], report)
                continue
            objectives = self.recorder.config.objectives
            if objectives_of(report, objectives) is None:
                shown = {name: report.get(name) for name in objectives}
                reason = report.get("reason") or f"ended without finite objectives: {shown}"
                self.recorder.failed(member["number"], reason, details=report.get("traceback"))
                continue
            with trial.checkpoint.as_directory() as folder:
                self.recorder.completed(member["number"], report, Path(folder) / str(member["number"]))
        self._close(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.recorder is None or is_gone():  # that says nothing of the trial
            return
        if trial.trial_id not in self.begun:  # an actor that never came up
            self.on_trial_start(iteration, trials, trial)
        for member in trial.config["members"]:
            self.recorder.failed(member["number"], self._reason(trial))
        self._close(trial)

    def _close(self, trial: Any) -> None:
        """The group's records go to the disk, in one piece, and then to Optuna."""
        assert self.recorder is not None
        assert self.searcher is not None
        for record in self.recorder.write():
            self.searcher.tell(record)
        if not self.recorder.unwritten:
            shutil.rmtree(trial.config["checkpoint"], ignore_errors=True)

    def _reason(self, trial: Any) -> str:
        """The time limit, or the last line of a failed group's traceback: error and sentence."""
        limit = trial.config["limit"]
        if time.monotonic() - self.begun[trial.trial_id] >= limit:
            place = where_it_hung(Path(trial.config["checkpoint"]))
            return too_long(limit, place, given=self.timeout is not None)
        path = trial.error_file
        text = Path(path).read_text() if path and Path(path).is_file() else ""
        lines = [line for line in text.splitlines() if line and not line.startswith(" ")]
        errors = [line for line in lines if ERROR.match(line)]  # Ray writes advice below some
        return (errors or lines or ["the trial's process ended without a word"])[-1]

    def __getstate__(self) -> dict[str, Any]:
        # what Tune pickles holds no client, no path, no secret
        return {"recorder": None, "searcher": None, "timeout": None, "begun": {}}


def contained(function: Callable[..., None]) -> Callable[..., None]:
    """The same function, but an exception in it is its final report.

    A trial is decided by its settings and its seed, so what it raises it would raise again. What Ray
    still sees fail is a process or a node that died, and only that is worth another try.
    """

    def run(config: Group, *, study: StudyConfig, cases: list[Case]) -> None:
        try:
            place = where_it_hung(Path(config["checkpoint"]))
            if place is not None:  # the limit ended it before
                given = study.trial_timeout is not None
                raise TimeoutError(too_long(config["limit"], place, given=given))
            function(config, study=study, cases=cases)
        except Exception as error:
            reason = traceback.format_exception_only(error)[-1].strip()
            members: list[MemberReport] = [
                {"number": one["number"], "reason": reason, "traceback": traceback.format_exc()}
                for one in config["members"]
            ]
            tune.report({"final": True, "members": members})

    return run


def run_search(
    config: StudyConfig,
    cases: list[Case],
    recorder: Recorder,
    *,
    folder: Path,
    concurrency: int,
    earlier: Earlier | None = None,
    storage: str | None = None,
    function: Callable[..., None] = trainable,
    interrupts: Interrupts | None = None,
) -> None:
    """Run all trials of a study that have no record yet; each ends in `recorder`.

    What `interrupts` hears ends it early: what runs then has no record, and is gone on with
    another time.

    A group whose process or node died is run again, `config.retries` times at most; to Optuna, MLflow
    and the records its trials are still the same ones.

    Args:
        folder: the study's folder; Optuna's database goes there.
        concurrency: actors at once.
        earlier: what earlier studies know.
        storage: a folder or URI that all nodes reach, for Ray's files; None is `folder`.
        function: what an actor runs; takes `config`, `study` and `cases` as `trainable` does.

    Ray's files are removed where no actor failed: nothing reads them later, and the masks are in the
    records' folders. Else they stay, for the tracebacks in them.
    """
    interrupts = interrupts or Interrupts()
    files = f"{storage}/{config.name}" if storage else str(folder.resolve())
    searcher = ParetoSearch(
        config,
        f"sqlite:///{(folder / 'optuna.db').resolve()}",
        records=recorder.records,
        checkpoints=storages.folder(files) / CHECKPOINTS,
        earlier=earlier,
    )
    if not (groups := searcher.groups_left()):
        searcher.close()
        return
    copies = f"{files}/{CHECKPOINTS}"
    if storages.is_bucket(files):
        function = with_bucket(function, copies)
    # Each parameter is put into the object store once, and fetched once a node.
    function = tune.with_parameters(contained(within_limits(function)), study=config, cases=cases)
    resources = {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
    tuner = tune.Tuner(
        tune.with_resources(function, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=groups,
            max_concurrent_trials=concurrency,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=_free_name(files),
            storage_path=files,
            failure_config=tune.FailureConfig(max_failures=config.retries),
            callbacks=[_Recording(recorder, searcher, config.trial_timeout)],
            verbose=0,
        ),
    )
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # how to restore Ray's own files
    # tracebacks of processes that died; the reason is in the trial's record
    logging.getLogger("ray.tune.execution.tune_controller").setLevel(logging.CRITICAL)
    with interrupts.ask_first():
        tuner.fit()
    for record in recorder.write():
        searcher.tell(record)
    searcher.close()
    if not interrupts.ended:
        shutil.rmtree(searcher.checkpoints, ignore_errors=True)
        if storages.is_bucket(files):
            storages.remove(copies)
    _remove_rays_files(files)


def _free_name(files: str) -> str:
    """Tune's folder, beside those that an earlier run of the study left for their tracebacks."""
    _remove_rays_files(files)
    taken = len(storages.folders(files, RAY))
    return f"{RAY}-{taken + 1}" if taken else RAY


def _remove_rays_files(files: str) -> None:
    for path in storages.folders(files, RAY):
        if not storages.holds(path, "error.txt"):
            storages.remove(path)
