"""The driver: groups go out to actors, their ends come in to the recorder."""

from __future__ import annotations

import logging
import re
import shutil
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from ray import tune

from study.search import storage as storages
from study.search.actor import trainable, with_bucket, within_limits
from study.search.embedded.liveness import is_gone
from study.search.interrupts import Interrupts
from study.search.pareto_search import (
    CHECKPOINTS,
    ParetoSearch,
    final_reports,
    objectives_of,
)
from study.search.warm_start import Earlier
from study.spec.config import StudyConfig, StudyError
from study.store.databases import sqlite_url
from study.store.environment import of_environment, patiently
from study.store.schema import FinalReport, Group, MemberReport, StepReport, TrialRecord, Trouble
from study.tracking.recorder import Recorder
from study.trial.cases import Case
from study.trial.limits import too_long, where_it_hung

ERROR = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt)\b")
Say = Callable[[str], None]
RAY = "ray"  # Tune's folder in the study's


class _Recording(tune.Callback):
    """Hands Tune's events to the recorder, and what it made of them to Optuna, in the driver.

    While the folder does not take an end, nothing else goes on in the driver: actors work and wait.

    Attributes:
        waiting: actors that wait for their environment.
        gone: why the study cannot go on: its environment did not come back in time.
    """

    def __init__(
        self, recorder: Recorder, searcher: ParetoSearch, interrupts: Interrupts, say: Say
    ) -> None:
        self.recorder: Recorder | None = recorder
        self.searcher: ParetoSearch | None = searcher
        self.timeout = recorder.config.trial_timeout
        self.interrupts: Interrupts | None = interrupts
        self.say: Say | None = say
        self.begun: dict[str, float] = {}
        self.waiting: set[str] = set()
        self.gone: StudyError | None = None

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if self.gone is not None:  # raised here it ends Tune; in another callback it would fail a trial
            raise self.gone

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.recorder is None:
            return
        self.begun[trial.trial_id] = time.monotonic()
        members = trial.config["members"]
        for member in members:
            if not self.recorder.knows(member["number"]):
                self.recorder.started(**member, group=len(members))

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,
        result: StepReport | FinalReport | Trouble,
        **_: Any,
    ) -> None:
        if self.recorder is None or self.say is None:
            return
        if "trouble" in result:
            if not self.waiting:  # what one of the actors waits for, the others wait for as well
                self.say(cast(Trouble, result)["trouble"])
            self.waiting.add(trial.trial_id)
        elif "final" not in result:
            self.recorder.reported(result)
        elif trial.trial_id in self.waiting:
            self.waiting.remove(trial.trial_id)
            if not any(one.get("environment") for one in cast(FinalReport, result)["members"]):
                self.say("It was possible again; going on.")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.recorder is None:
            return
        reports = final_reports(trial.last_result)
        if waited := next((r["reason"] for r in reports.values() if r.get("environment")), None):
            self.gone = self.gone or StudyError(waited)  # the trials have not ended
            return
        self._patiently(lambda: self._end(trial, reports), trial)

    def _end(self, trial: Any, reports: dict[int, MemberReport]) -> None:
        """The ends of a group's trials in the recorder; may be called again after an OSError."""
        assert self.recorder is not None
        for member in trial.config["members"]:
            number = member["number"]
            if number not in self.recorder.open:
                continue
            report: MemberReport = reports.get(number, {"number": number})
            if "stopped" in report:
                self.recorder.pruned(number, report)
                continue
            objectives = self.recorder.config.objectives
            if objectives_of(report, objectives) is None:
                shown = {name: report.get(name) for name in objectives}
                reason = report.get("reason") or f"ended without finite objectives: {shown}"
                self.recorder.failed(number, reason, details=report.get("traceback"))
                continue
            with trial.checkpoint.as_directory() as folder:
                self.recorder.completed(number, report, Path(folder) / str(number))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.recorder is None or is_gone():  # that says nothing of the trial
            return
        if trial.trial_id not in self.begun:  # an actor that never came up
            self.on_trial_start(iteration, trials, trial)
        for member in trial.config["members"]:
            self.recorder.failed(member["number"], self._reason(trial))
        self._patiently(lambda: None, trial)

    def _patiently(self, end: Callable[[], None], trial: Any) -> None:
        """A group's ends go to the disk, its records in one piece, and then to Optuna."""
        assert self.recorder is not None
        assert self.searcher is not None
        recorder, interrupts = self.recorder, self.interrupts

        def written() -> list[TrialRecord]:
            end()
            return recorder.write()

        try:
            records = patiently(
                written,
                patience=recorder.config.environment_timeout,
                say=self.say or (lambda _: None),
                what=f"write to {recorder.folder}",
                given_up=lambda: interrupts is not None and interrupts.ended,
            )
        except StudyError as error:
            self.gone = error
            return
        for record in records:
            self.searcher.tell(record)
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
        nothing = dict.fromkeys(("recorder", "searcher", "timeout", "interrupts", "say", "gone"))
        return {**nothing, "begun": {}, "waiting": set()}


def contained(function: Callable[..., None]) -> Callable[..., None]:
    """The same function, but an exception in it is its final report.

    A trial is decided by its settings and its seed, so what it raises it would raise again. What Ray
    still sees fail is a process or a node that died, and only that is worth another try. What its
    environment refuses (an OSError) is no verdict on it: the actor waits, and goes on from the trial's
    last state.
    """

    def run(config: Group, *, study: StudyConfig, cases: list[Case]) -> None:
        place = Path(config["checkpoint"])

        def attempt() -> None:
            if (hung := where_it_hung(place)) is not None:  # the limit ended it before
                given = study.trial_timeout is not None
                raise TimeoutError(too_long(config["limit"], hung, given=given))
            function(config, study=study, cases=cases)

        def report(error: Exception, reason: str, **more: bool) -> None:
            lines = "".join(traceback.format_exception(error))
            members: list[Any] = [
                {"number": one["number"], "reason": reason, "traceback": lines, **more}
                for one in config["members"]
            ]
            tune.report({"final": True, "members": members})

        numbers, told = ", ".join(str(one["number"]) for one in config["members"]), False

        def say(text: str) -> None:
            nonlocal told
            if not told:  # that it goes on shows in the final report, which must be the last
                tune.report({"trouble": text})
            told = True

        try:
            patiently(
                attempt,
                patience=study.environment_timeout,
                say=say,
                what=f"run trial {numbers} on {socket.gethostname()}",
            )
        except Exception as error:
            if isinstance(error, StudyError) and error.__cause__ and of_environment(error):
                report(error, str(error), environment=True)
            else:
                report(error, traceback.format_exception_only(error)[-1].strip())

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
    say: Say = lambda _: None,
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
        say: told in a sentence what the study waits for, and what it had lost.

    Raises:
        StudyError: Optuna's database cannot be read, or the environment (a full disk, a database that
            is locked) did not come back in `environment_timeout`. What has a record stays.

    Ray's files are removed where no actor failed: nothing reads them later, and the masks are in the
    records' folders. Else they stay, for the tracebacks in them.
    """
    interrupts = interrupts or Interrupts()
    files = f"{storage}/{config.name}" if storage else str(folder.resolve())
    searcher = ParetoSearch(
        config,
        sqlite_url(folder / "optuna.db"),
        records=recorder.records,
        checkpoints=storages.folder(files) / CHECKPOINTS,
        earlier=earlier,
        say=say,
        given_up=lambda: interrupts.ended,
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
            callbacks=[_Recording(recorder, searcher, interrupts, say)],
            verbose=0,
        ),
    )
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # how to restore Ray's own files
    # tracebacks of processes that died; the reason is in the trial's record
    logging.getLogger("ray.tune.execution.tune_controller").setLevel(logging.CRITICAL)
    try:
        with interrupts.ask_first():
            tuner.fit()
    except Exception as error:  # Tune writes as well
        if isinstance(error, StudyError) or (why := of_environment(error)) is None:
            raise
        raise StudyError(
            f"Ray cannot write to {files} ({why}); mend it, then go on with "
            f"{' '.join(config.resuming)}: what has no record is run again."
        ) from error
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
