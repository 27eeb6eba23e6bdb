"""The search: Optuna proposes, Ray Tune runs, every trial ends in one record.

The only file that imports ray or optuna. Facts of the stack that shape it:

- Ray's own OptunaSearch turns a two-objective study into a single-objective one when TuneConfig names
  a metric, and leaves a trial RUNNING for ever when a metric is NaN or missing. `ParetoSearch` speaks
  to Optuna through its public ask-and-tell interface: two directions, or it does not start, and
  every trial is told COMPLETE with finite values or FAIL.
- A trial that ends early never reaches the front: only a final report carries objectives.
- Actors are reused, so each trial sets its own threads and works on copies.
"""

from __future__ import annotations

import json
import math
import os
import socket
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # records are ours
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a CPU trial leaves GPUs visible

import optuna
import ray
import torch
from optuna.trial import TrialState
from ray import tune
from ray.tune.search import Searcher
from safetensors.torch import save_file

from bimask.config import PurifyConfig
from bimask.metrics import Scores
from bimask.purify import RoundLog
from study.config import StudyConfig, StudyError
from study.pareto import OBJECTIVES
from study.plots import draw_masks
from study.records import Recorder
from study.space import suggest
from study.trial import Case, TrialResult, run_trial

PAPER = "paper"  # the preset of trial 0


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
    """How many trials run at once on the nodes that are up.

    Raises:
        StudyError: no node offers the CPUs or the GPU share of one trial.
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
            f"A trial asks for {cpus} CPU(s) and {gpus:g} GPU, but the largest of {len(nodes)} "
            f"node(s) has {max(node.get('CPU', 0) for node in nodes):g} CPU(s); lower "
            "`cpus_per_trial` or `gpus_per_trial`, or wait until larger nodes are up."
        )
    return min(config.concurrency or fitting, fitting, config.trials)


class ParetoSearch(Searcher):
    """Optuna's multi-objective search, one Optuna trial a Tune trial.

    Args:
        config: the study.
        storage: Optuna's storage URL; the study in it must be new.
    """

    def __init__(self, config: StudyConfig, storage: str) -> None:
        super().__init__()
        self.config = config
        self.storage = storage
        self.asked: dict[str, optuna.Trial] = {}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            storage=storage,
            study_name=config.name,
            directions=list(OBJECTIVES.values()),
            sampler=SAMPLERS[config.sampler](config.seed),
        )
        if len(self.study.directions) != len(OBJECTIVES):
            raise StudyError(f"Optuna's study has directions {self.study.directions}.")
        with warnings.catch_warnings():  # "experimental" since 3.2; names the axes in dashboards
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.set_metric_names(list(OBJECTIVES))
        self.study.enqueue_trial({}, user_attrs={"preset": PAPER})
        for point in config.start:
            self.study.enqueue_trial(point)

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        """The space and the objectives are this searcher's own."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The next configuration: `number`, `preset` and `parameters` of the trial."""
        trial = self.asked[trial_id] = self.study.ask()
        preset = trial.user_attrs.get("preset")
        trial.set_user_attr("tune_trial_id", trial_id)
        parameters = published() if preset == PAPER else suggest(self.config.space, trial)
        return {"number": trial.number, "preset": preset, "parameters": parameters}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna: COMPLETE with finite values of a final report, or FAIL."""
        values = None if error else objectives_of(result)
        if values is None:
            self.study.tell(self.asked[trial_id], state=TrialState.FAIL)
        else:
            self.study.tell(self.asked[trial_id], values)

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
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=6),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


def published() -> dict[str, Any]:
    """The paper's defaults, every setting."""
    return PurifyConfig().model_dump()


def objectives_of(result: dict[str, Any] | None) -> list[float] | None:
    """The objectives of a final report in order, or None where one is missing or not finite."""
    if not result or not result.get("final"):
        return None
    values = [result.get(name) for name in OBJECTIVES]
    if all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        return [float(v) for v in values if v is not None]
    return None


def trainable(config: dict[str, Any], *, study: StudyConfig, cases: list[Case]) -> None:
    """What a Ray actor runs: one trial, with its share of the threads."""
    torch.set_num_threads(study.cpus_per_trial)
    purify_config = (
        PurifyConfig.model_validate(config["parameters"])
        if config["preset"] == PAPER
        else study.purify_config(config["parameters"])
    )
    device = study.device
    if device == "auto":
        device = "cuda" if study.gpus_per_trial else "cpu"

    def report(victim: str, log: RoundLog, scores: Scores) -> None:
        tune.report({"victim": victim, "step": log.step, "loss": log.loss, **asdict(scores)})

    result = run_trial(
        purify_config,
        cases,
        seed=study.seed,
        device=device,
        report_every=study.report_every,
        on_report=report,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_artifacts(result, Path(folder), config["number"])
        tune.report(
            {"final": True, "device": device, **result.record()},
            checkpoint=tune.Checkpoint.from_directory(folder),
        )


def write_artifacts(result: TrialResult, folder: Path, number: int) -> None:
    """Masks (safetensors), their picture and the rounds (JSON) of every victim."""
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
        if self.recorder is not None:
            self.recorder.started(**trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        if self.recorder is not None and not result.get("final"):
            self.recorder.reported(trial.config["number"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.recorder is None:
            return
        number, result = trial.config["number"], trial.last_result
        if objectives_of(result) is None:
            shown = {name: result.get(name) for name in OBJECTIVES} if result else None
            self.recorder.failed(number, f"ended without finite objectives: {shown}")
            return
        with trial.checkpoint.as_directory() as folder:
            self.recorder.completed(number, result, Path(folder))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.recorder is not None:
            if not self.recorder.knows(trial.config["number"]):  # its actor never came up
                self.recorder.started(**trial.config)
            self.recorder.failed(trial.config["number"], _reason(trial))

    def __getstate__(self) -> dict[str, Any]:
        return {"recorder": None}  # what Tune pickles holds no client, no path, no secret


def _reason(trial: Any) -> str:
    """The last line of a failed trial's traceback: the error and its sentence."""
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
        concurrency: trials at once.
        function: what an actor runs; takes `config`, `study` and `cases` as `trainable` does.
    """
    searcher = ParetoSearch(config, f"sqlite:///{(folder / 'optuna.db').resolve()}")
    function = tune.with_parameters(function, study=config, cases=cases)
    resources = {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
    tuner = tune.Tuner(
        tune.with_resources(function, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=config.trials,
            max_concurrent_trials=concurrency,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(folder.resolve()),
            callbacks=[_Recording(recorder)],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        for number in searcher.close():
            recorder.failed(number, "the study ended before the trial did")
