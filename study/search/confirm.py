"""The confirmation's purifications, spread over the cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import torch

from bimask.errors import NonFiniteError
from bimask.victim import Victim
from study.config import StudyConfig
from study.suite import Job, confirm


def run_confirmation(
    config: StudyConfig,
    victims: Mapping[str, Victim],
    jobs: Sequence[Job],
    on_done: Callable[[dict[str, Any]], None],
) -> None:
    """Run all jobs, as many at once as there is room for.

    Args:
        on_done: called with the record of each job as it ends; one that failed has a `reason` and no
            scores.
    """
    placed = {name: ray.put(victim) for name, victim in victims.items()}
    task = ray.remote(_run).options(
        num_cpus=config.cpus_per_trial, num_gpus=config.gpus_per_trial, max_retries=2
    )
    running = {task.remote(job, placed[job.victim], config): job for job in jobs}
    while running:
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        job = running.pop(done)
        try:
            on_done(ray.get(done))
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            on_done(_failed(job, lines[-1]))


def _run(job: Job, victim: Victim, config: StudyConfig) -> dict[str, Any]:
    torch.set_num_threads(config.cpus_per_trial)
    try:
        return confirm(job, victim, config, device=config.device_of_a_trial)
    except NonFiniteError as error:
        return _failed(job, f"NonFiniteError: {error}")


def _failed(job: Job, reason: str) -> dict[str, Any]:
    configuration, victim, seed = job.key
    return {"configuration": configuration, "victim": victim, "role": job.role, "seed": seed} | {
        "reason": reason
    }
