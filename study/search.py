"""The search: Optuna proposes, Ray Tune runs, every trial ends in one record.

A trial is Optuna's. What Ray calls a trial is a group of them, `trials_per_actor` or fewer, which one
actor runs at once; its configuration and its final report hold a list, one entry a member.

The only file that imports ray or optuna. Facts of the stack that shape it:

- Ray's own OptunaSearch turns a two-objective study into a single-objective one when TuneConfig names
  a metric, and leaves a trial RUNNING for ever when a metric is NaN or missing. `ParetoSearch` speaks
  to Optuna through its public ask-and-tell interface: two directions, or it does not start, and
  every trial is told COMPLETE with finite values or FAIL.
- A trial that ends early never reaches the front: only a final report carries objectives.
- Trials of a group are asked for before the first of them is told, so TPE must keep its distance from
  those still running: `constant_liar`, the default since Optuna 5, for several objectives since 3.5.
- Actors are reused, so each trial sets its own threads and works on copies.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # records are ours
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a CPU trial leaves GPUs visible
# Actors started from here keep the memory they free: glibc hands every large tensor back to the kernel
# otherwise, and faulting its pages in again costs a trial on a CPU a tenth of its time.
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**32))
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_TOP_PAD_", str(2**26))

import optuna
import ray
import torch
from optuna.trial import TrialState
from ray import tune
from ray.tune.search import Searcher
from safetensors.torch import save_file

from bimask.config import PurifyConfig
from bimask.errors import NonFiniteError
from bimask.metrics import Scores
from bimask.purify import RoundLog
from study.config import StudyConfig, StudyError
from study.pareto import OBJECTIVES
from study.plots import draw_masks
from study.records import Recorder
from study.space import suggest
from study.trial import Case, TrialResult, run_trials

PAPER = "paper"  # the preset of trial 0
RAY = "ray"  # Tune's folder in the study's


def start_ray(address: str | None) -> None:
    """Join the cluster at `address` (or RAY_ADDRESS, or one running here), else start a local one.

    Raises:
        StudyError: no cluster answers there, or it runs other versions.
    """
    where = address or os.environ.get("RAY_ADDRESS") or "this machine"
    try:
        _require_listener(where)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StudyError(
            f"Cannot join Ray at {where} ({reason}); start it with `ray start --head`, or leave the "
            "address out to run here."
        ) from error


def _require_listener(address: str) -> None:
    """A ConnectionError where nobody listens at HOST:PORT: Ray itself would end the process."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def stop_ray() -> None:
    """Leave the cluster, or stop the local one."""
    ray.shutdown()


def check_resources(config: StudyConfig) -> int:
    """How many actors run at once on the nodes that are up.

    Raises:
        StudyError: no node offers the CPUs or the GPU share of one actor.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = config.cpus_per_trial, config.gpus_per_trial

    def slots(node: dict[str, float]) -> int:
        by_cpu = node.get("CPU", 0) // cpus
        return int(min(by_cpu, node.get("GPU", 0) // gpus) if gpus else by_cpu)

    if gpus and not any(node.get("GPU", 0) for node in nodes):
        raise StudyError(
            f"`gpus_per_trial` is {gpus:g}, but Ray sees no GPU on {len(nodes)} node(s); set it to 0, "
            "or join a cluster whose GPU nodes are up."
        )
    fitting = sum(map(slots, nodes))
    if not fitting:
        raise StudyError(
            f"An actor asks for {cpus} CPU(s) and {gpus:g} GPU, but the largest of {len(nodes)} "
            f"node(s) has {max(node.get('CPU', 0) for node in nodes):g} CPU(s); lower "
            "`cpus_per_trial` or `gpus_per_trial`, or wait until larger nodes are up."
        )
    return min(config.concurrency or fitting, fitting, config.groups)


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


def trainable(config: dict[str, Any], *, study: StudyConfig, cases: list[Case]) -> None:
    """What a Ray actor runs: the trials of one group at once, with its share of the threads."""
    torch.set_num_threads(study.cpus_per_trial)
    members = config["members"]
    device = study.device
    if device == "auto":
        device = "cuda" if study.gpus_per_trial else "cpu"

    def report(member: int, victim: str, log: RoundLog, scores: Scores) -> None:
        number = members[member]["number"]
        tune.report(
            {"number": number, "victim": victim, "step": log.step, "loss": log.loss, **asdict(scores)}
        )

    results = run_trials(
        [
            PurifyConfig.model_validate(member["parameters"])
            if member["preset"] == PAPER
            else study.purify_config(member["parameters"])
            for member in members
        ],
        cases,
        seed=study.seed,
        device=device,
        report_every=study.report_every,
        on_report=report,
    )
    reports: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for member, result in zip(members, results, strict=True):
            number = member["number"]
            if isinstance(result, NonFiniteError):
                reports.append({"number": number, "reason": f"NonFiniteError: {result}"})
            else:
                write_artifacts(result, Path(folder) / str(number), number)
                reports.append({"number": number, "device": device, **result.record()})
        kept = tune.Checkpoint.from_directory(folder) if any(Path(folder).iterdir()) else None
        tune.report({"final": True, "members": reports}, checkpoint=kept)


def write_artifacts(result: TrialResult, folder: Path, number: int) -> None:
    """Masks (safetensors), their picture and the rounds (JSON) of every victim, in a new folder."""
    folder.mkdir()
    for name, case in result.cases.items():
        save_file(case.masks.tensors(), folder / f"{name}.masks.safetensors")
        draw_masks(folder / f"{name}.masks.png", case.masks, f"trial {number}, {name}")
        rounds = [asdict(log) for log in case.rounds]
        (folder / f"{name}.rounds.json").write_text(json.dumps(rounds))


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
                self.recorder.failed(number, reason)
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


def run_search(
    config: StudyConfig,
    cases: list[Case],
    recorder: Recorder,
    *,
    folder: Path,
    concurrency: int,
    function: Callable[..., None] = trainable,
) -> None:
    """Run all trials of a study; each ends in `recorder` as COMPLETE or FAILED.

    Args:
        folder: the study's folder; Optuna's database and Ray's files go there.
        concurrency: actors at once.
        function: what an actor runs; takes `config`, `study` and `cases` as `trainable` does.

    Ray's files are removed where no actor failed: nothing reads them later, and the masks are in the
    records' folders. Else they stay, for the tracebacks in them.
    """
    searcher = ParetoSearch(config, f"sqlite:///{(folder / 'optuna.db').resolve()}")
    function = tune.with_parameters(function, study=config, cases=cases)
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
            storage_path=str(folder.resolve()),
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
        shutil.rmtree(folder / RAY, ignore_errors=True)
