"""The Ray cluster: joined or started, asked what it has room for, left."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import ray
from ray.autoscaler.sdk import request_resources

from study.search.embedded import exposure, liveness, own_ray, remedies
from study.spec.config import StudyConfig, StudyError

TO_ACTORS = (  # what the package's __init__ has set; a cluster's nodes were started without it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
)
POLL = 5.0  # seconds between two looks for workers
ATTEMPTS = 3  # at starting a Ray here


def start_ray(address: str | None, say: Callable[[str], None] = print) -> bool:
    """Join Ray at `address`, at RAY_ADDRESS, or as `ray start` left it here, else start one.

    Args:
        say: is told, in one sentence, of a Ray here that is another user's: it is joined by its address
            alone.

    Returns:
        Whether it was started here: its one node is this process's own.

    Raises:
        StudyError: no cluster answers there, or it runs other versions, or none can be started here;
            it names the cause, and what to do about that.
    """
    exposure.protect_token_file()
    named = address not in (None, "", "auto")
    where = address if named else os.environ.get("RAY_ADDRESS") or address
    try:
        if where in (None, "", "auto"):
            joined = _join_left(say)
            if not joined and where == "auto":
                raise ConnectionError("none of yours runs on this machine")
        elif joined := where != "local":
            _require_listener(where)
            _join(where)
        if not joined:
            _start()
        return not joined
    except StudyError:
        raise
    except own_ray.NotStartedError as error:
        raise StudyError(remedies.started(error, error.said, error.place)) from error
    except Exception as error:  # Ray raises just that, as well
        raise StudyError(remedies.joined(error, where or "this machine")) from error


def _join_left(say: Callable[[str], None]) -> bool:
    """Join what this user's `ray start` left on this machine; whether there is one that answers."""
    if (left := exposure.left_here()) is None:
        return False
    if left.owner is not None:
        say(
            f"The Ray at {left.address} on this machine belongs to {left.owner} and is not joined; "
            f"if you trust whoever runs it, give --address {left.address}."
        )
        return False
    try:
        _require_listener(left.address)
        exposure.use_token_of_user()
        _join(left.address)
    except OSError:
        return False  # it has died since
    return True


def _join(address: str) -> None:
    """What `ray start` or a cluster launcher started, but no Ray of another program's own."""
    variables = {name: os.environ[name] for name in TO_ACTORS}
    ray.init(
        address=address,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": variables},
    )


def _start() -> None:
    """A Ray of our own, tried again where a busy machine takes longer than Ray waits.

    It has no dashboard, a dozen processes, and no runtime environment: its workers have this process's
    variables, and those that Ray starts beforehand can be used.
    """
    for attempt in range(ATTEMPTS):
        exposure.close()
        try:
            with own_ray.guarded():
                own_ray.start(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
                exposure.require_closed()
                liveness.ray_gone(own=True)  # it asks the GCS
            return
        except Exception as error:
            _stop()
            passing = isinstance(error, own_ray.NotStartedError) and remedies.may_pass(
                error, error.said
            )
            if not passing or attempt + 1 == ATTEMPTS:
                raise


def _require_listener(address: str) -> None:
    """A ConnectionError where nobody listens at HOST:PORT: Ray itself would end the process."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def stop_ray() -> None:
    """Leave the cluster, or stop the local one."""
    _stop()
    own_ray.set_last_words("")


def _stop() -> None:
    liveness.forget()
    own_ray.stop()
    exposure.restore()


def room(cpus: int, gpus: float) -> int:
    """How many actors or tasks of that size fit on the nodes that are up."""
    return sum(_slots(cpus, gpus, node["Resources"]) for node in ray.nodes() if node["Alive"])


def _slots(cpus: int, gpus: float, node: dict[str, float]) -> int:
    by_cpu = node.get("CPU", 0) // cpus
    return int(min(by_cpu, node.get("GPU", 0) // gpus) if gpus else by_cpu)


def check_resources(
    config: StudyConfig, *, wait: float = 0, on_wait: Callable[[], None] = lambda: None
) -> int:
    """How many actors run at once.

    Args:
        wait: minutes. Where it is not 0, the autoscaler is asked for room for all actors, and the study
            starts when the first fits; the others start as their nodes come up. `release_workers` takes
            the request back.
        on_wait: called before every look for workers.

    Raises:
        StudyError: no node offers the CPUs or the GPU share of one actor.
    """
    cpus, gpus = config.cpus_per_trial, config.gpus_per_trial
    wanted = min(config.concurrency or 1, config.groups)
    fitting = await_room(cpus, gpus, wanted=wanted, wait=wait, on_wait=on_wait)
    if not fitting:
        raise StudyError(_no_room(config, wait))
    if wait and config.concurrency:
        return min(config.concurrency, config.groups)
    return min(config.concurrency or fitting, fitting, config.groups)


def await_room(
    cpus: int, gpus: float, *, wanted: int, wait: float, on_wait: Callable[[], None] = lambda: None
) -> int:
    """How many actors or tasks of that size fit at once; 0 where no node has room for one.

    Args:
        wanted: for how many the autoscaler is asked, where `wait` is not 0.
        wait, on_wait: as of `check_resources`.
    """
    if wait:
        bundle = {"CPU": float(cpus), "GPU": gpus}
        request_resources(bundles=[{k: v for k, v in bundle.items() if v}] * wanted)
    deadline = time.monotonic() + 60 * wait
    while not (fitting := room(cpus, gpus)) and time.monotonic() < deadline:
        on_wait()
        time.sleep(POLL)
    return fitting


def release_workers() -> None:
    """Take back what `await_room` asked for; idle workers are then ended."""
    request_resources(bundles=[])


def _no_room(config: StudyConfig, wait: float) -> str:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = config.cpus_per_trial, config.gpus_per_trial
    waited = f" after {wait:g} minutes" if wait else ""
    if gpus and not any(node.get("GPU", 0) for node in nodes):
        return (
            f"`gpus_per_trial` is {gpus:g}, but Ray sees no GPU on {len(nodes)} node(s){waited}; set "
            "it to 0, join a cluster whose GPU nodes are up, or let it start them with --wait MINUTES."
        )
    return (
        f"An actor asks for {cpus} CPU(s) and {gpus:g} GPU, but the largest of {len(nodes)} "
        f"node(s) has {max(node.get('CPU', 0) for node in nodes):g} CPU(s){waited}; lower "
        "`cpus_per_trial` or `gpus_per_trial`, or wait until larger nodes are up (--wait MINUTES)."
    )
