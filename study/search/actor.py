"""What an actor does with a group of trials."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from ray import tune
from safetensors.torch import save

from bimask.defences.base import StepLog
from bimask.errors import NonFiniteError
from bimask.metrics import CleanScores, Scores
from bimask.tasks import defence_of
from study.report.pictures import draw_masks
from study.search import storage as storages
from study.spec.config import StudyConfig
from study.store.schema import Group, MemberReport
from study.trial.cases import Case
from study.trial.checkpoint import Checkpoints
from study.trial.history import StoppingBounds
from study.trial.limits import gpu_memory_limit, memory_limit, time_limit
from study.trial.result import TrialResult
from study.trial.rules import TrialRules
from study.trial.run import run_trials


def within_limits(function: Callable[..., None]) -> Callable[..., None]:
    """`function`, ended where it takes more than the study allows a group of trials."""

    def run(config: Group, *, study: StudyConfig, cases: list[Case]) -> None:
        gpu_memory_limit(study.gpus_per_trial)
        with (
            time_limit(config.get("limit"), Path(config["checkpoint"])),
            memory_limit(study.memory_per_trial),
        ):
            function(config, study=study, cases=cases)

    return run


def with_bucket(function: Callable[..., None], bucket: str) -> Callable[..., None]:
    """`function`, for nodes that share no folder: what it goes on from is fetched from a bucket.

    Args:
        bucket: URI. Each group of trials has a folder in it, where `trainable` copies its checkpoints.
    """

    def run(config: Group, *, study: StudyConfig, cases: list[Case]) -> None:
        folder = Path(config["checkpoint"])
        copies = f"{bucket}/{folder.name}"
        with suppress(OSError):  # without them the trial begins anew
            storages.fetch(copies, folder)
        function({**config, "copies": copies}, study=study, cases=cases)

    return run


def checkpoints_of(config: Group, every: float) -> Checkpoints | None:
    """Where a group's populations are kept; None where it was given no place."""
    if "checkpoint" not in config:
        return None
    folder = Path(config["checkpoint"])
    if "copies" in config:
        return Checkpoints(folder, every, partial(storages.put, config["copies"]))
    return Checkpoints(folder, every)


def trainable(config: Group, *, study: StudyConfig, cases: list[Case]) -> None:
    """What a Ray actor runs: the trials of one group at once, with its share of the threads."""
    torch.set_num_threads(study.cpus_per_trial)
    members = config["members"]
    device = study.device_of_a_trial

    def report(member: int, victim: str, log: StepLog, scores: Scores | CleanScores) -> None:
        number = members[member]["number"]
        tune.report(
            {"number": number, "victim": victim, "step": log.step, "loss": log.loss, **asdict(scores)}
        )

    results = run_trials(
        [study.defence_config(member["parameters"]) for member in members],
        cases,
        seed=study.seed,
        device=device,
        report_every=study.report_every,
        on_report=report,
        rules=TrialRules.of(study, StoppingBounds.of(config.get("rivals"))),
        repeats=[study.repeats_of(member["preset"]) for member in members],
        checkpoints=checkpoints_of(config, study.checkpoint_every),
    )
    reports: list[MemberReport] = []
    place = config.get("checkpoint")  # where nodes share a folder: one with a full disk has room there
    if place is not None:
        Path(place).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for member, result in zip(members, results, strict=True):
            number = member["number"]
            if isinstance(result, NonFiniteError):
                reports.append({"number": number, "reason": f"NonFiniteError: {result}"})
            else:
                if result.stopped is None:
                    write_artifacts(result, Path(folder) / str(number), number)
                reports.append(result.report(number, device))
        kept = tune.Checkpoint.from_directory(folder) if any(Path(folder).iterdir()) else None
        tune.report({"final": True, "members": reports}, checkpoint=kept)


def write_artifacts(result: TrialResult, folder: Path, number: int) -> None:
    """What every run stored (safetensors), a picture of its masks, and its steps (JSON), in a new
    folder."""
    folder.mkdir()
    for name, case in result.cases.items():
        defence = defence_of(case.result.config)
        cost = {kind: str(count) for kind, count in asdict(case.result.passes).items()}
        cost["seconds"] = f"{case.result.seconds:.3f}"
        # safetensors' own writer raises an error of its own where the disk is full, and no OSError
        content = save(case.tensors, metadata=cost)
        (folder / f"{name}.{defence.stem}.safetensors").write_bytes(content)
        masks = defence.masks(case.tensors, case.result.config)
        if masks is not None:
            draw_masks(folder / f"{name}.masks.png", masks, f"trial {number}, {name}")
        steps = [asdict(log) for log in case.result.history]  # type: ignore[call-overload]
        (folder / f"{name}.rounds.json").write_text(json.dumps(steps))
