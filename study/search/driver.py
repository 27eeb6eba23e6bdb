"""The driver: groups go out to actors, their ends come in to the recorder."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune

from study.config import StudyConfig
from study.pareto import OBJECTIVES
from study.records import Recorder
from study.search import storage as storages
from study.search.actor import trainable
from study.search.pareto_search import ParetoSearch, final_reports, objectives_of
from study.trial import Case

RAY = "ray"  # Tune's folder in the study's


class _Recording(tune.Callback):
    """Hands Tune's events to the recorder, in the driver."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder: Recorder | None = recorder

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.recorder is None:
            return
        members = trial.config["members"]
        for member in members:
            if not self.recorder.knows(member["number"]):
                self.recorder.started(**member, group=len(members))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        if self.recorder is not None and not result.get("final"):
            self.recorder.reported(result["number"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.recorder is None:
            return
        reports = final_reports(trial.last_result)
        for member in trial.config["members"]:
            number = member["number"]
            report = reports.get(number, {})
            if objectives_of(report) is None:
                shown = {name: report.get(name) for name in OBJECTIVES}
                reason = report.get("reason") or f"ended without finite objectives: {shown}"
                self.recorder.failed(number, reason, details=report.get("traceback"))
                continue
            with trial.checkpoint.as_directory() as folder:
                self.recorder.completed(number, report, Path(folder) / str(number))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.recorder is None:
            return
        self.on_trial_start(iteration, trials, trial)  # for an actor that never came up
        for member in trial.config["members"]:
            self.recorder.failed(member["number"], _reason(trial))

    def __getstate__(self) -> dict[str, Any]:
        return {"recorder": None}  # what Tune pickles holds no client, no path, no secret


def _reason(trial: Any) -> str:
    """The last line of a failed group's traceback: the error and its sentence."""
    path = trial.error_file
    text = Path(path).read_text() if path and Path(path).is_file() else ""
    lines = [line for line in text.splitlines() if line and not line.startswith(" ")]
    return lines[-1] if lines else "the trial's process ended without a word"


def contained(function: Callable[..., None]) -> Callable[..., None]:
    """The same function, but an exception in it is its final report.

    A trial is decided by its settings and its seed, so what it raises it would raise again. What Ray
    still sees fail is a process or a node that died, and only that is worth another try.
    """

    def run(config: dict[str, Any], **parameters: Any) -> None:
        try:
            function(config, **parameters)
        except Exception as error:
            failure = {
                "reason": traceback.format_exception_only(error)[-1].strip(),
                "traceback": traceback.format_exc(),
            }
            members = [{"number": member["number"], **failure} for member in config["members"]]
            tune.report({"final": True, "members": members})

    return run


def run_search(
    config: StudyConfig,
    cases: list[Case],
    recorder: Recorder,
    *,
    folder: Path,
    concurrency: int,
    storage: str | None = None,
    function: Callable[..., None] = trainable,
) -> None:
    """Run all trials of a study; each ends in `recorder` as COMPLETE or FAILED.

    A group whose process or node died is run again, `config.retries` times at most; to Optuna, MLflow
    and the records its trials are still the same ones.

    Args:
        folder: the study's folder; Optuna's database goes there.
        concurrency: actors at once.
        storage: a folder or URI that all nodes reach, for Ray's files; None is `folder`.
        function: what an actor runs; takes `config`, `study` and `cases` as `trainable` does.

    Ray's files are removed where no actor failed: nothing reads them later, and the masks are in the
    records' folders. Else they stay, for the tracebacks in them.
    """
    searcher = ParetoSearch(config, f"sqlite:///{(folder / 'optuna.db').resolve()}")
    files = f"{storage}/{config.name}" if storage else str(folder.resolve())
    # Each parameter is put into the object store once, and fetched once a node.
    function = tune.with_parameters(contained(function), study=config, cases=cases)
    resources = {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
    tuner = tune.Tuner(
        tune.with_resources(function, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=config.groups,
            max_concurrent_trials=concurrency,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=RAY,
            storage_path=files,
            failure_config=tune.FailureConfig(max_failures=config.retries),
            callbacks=[_Recording(recorder)],
            verbose=0,
        ),
    )
    try:
        failed = tuner.fit().num_errors
    finally:
        for number in searcher.close():
            recorder.failed(number, "the study ended before the trial did")
    if not failed:
        storages.remove(files if storage else f"{files}/{RAY}")
