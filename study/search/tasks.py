"""Work beside the trials, spread over the cluster: Ray tasks, each with the resources of a trial."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
import torch

from study.search.embedded.liveness import is_gone
from study.spec.config import StudyConfig

RETRIES = 2  # of a task whose process died


class LostTaskError(Exception):
    """A task from which nothing came back; why, in one line."""


def run_tasks(
    config: StudyConfig,
    function: Callable[..., Any],
    shared: Iterable[tuple[str, Any]],
    arguments: Sequence[tuple[Any, ...]],
    on_done: Callable[[int, Any], None],
) -> None:
    """Call `function` once for each of `arguments`, as many at once as there is room for.

    Args:
        shared: what several calls get, with its name; it is asked for and sent once, one after another,
            so that what is large need not be here all at once.
        arguments: the first is the name of what is shared, and the function gets that.
        on_done: called with a position among `arguments` and what came back, as each ends; a
            LostTaskError where nothing did.
    """
    placed = {name: ray.put(value) for name, value in shared}
    task = ray.remote(_with_threads).options(
        num_cpus=config.cpus_per_trial, num_gpus=config.gpus_per_trial, max_retries=RETRIES
    )
    running = {
        task.remote(config.cpus_per_trial, function, placed[name], *given): at
        for at, (name, *given) in enumerate(arguments)
    }
    # What an error or a signal leaves running ends with this process: `ray.cancel` of a task that ends
    # at that moment ends the driver, below Python (pull request 54798 of Ray mends one way to it).
    while running:
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        at = running.pop(done)
        try:
            result = ray.get(done)
        except ray.exceptions.RayError as error:
            if is_gone():
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            result = LostTaskError(lines[-1])
        on_done(at, result)


def _with_threads(threads: int, function: Callable[..., Any], *given: Any) -> Any:
    torch.set_num_threads(threads)
    return function(*given)
