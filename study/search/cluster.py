"""The Ray cluster: joined or started, asked what it has room for, left."""

from __future__ import annotations

import os
import socket

import ray

from study.config import StudyConfig, StudyError

ATTEMPTS = 3  # at starting a Ray here


def start_ray(address: str | None) -> None:
    """Join the cluster at `address` (or RAY_ADDRESS, or one running here), else start a local one.

    Raises:
        StudyError: no cluster answers there, or it runs other versions.
    """
    where = address or os.environ.get("RAY_ADDRESS") or "this machine"
    try:
        _require_listener(where)
        _init(address)
    except Exception as error:  # Ray raises just that, as well
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StudyError(
            f"Cannot join Ray at {where} ({reason}); start it with `ray start --head`, or leave the "
            "address out to run here."
        ) from error


def _init(address: str | None) -> None:
    """ray.init; again where a busy machine was too slow for the half minute that Ray gives itself."""
    # no dashboard, a dozen processes, for a Ray of this process alone
    quiet = {"include_dashboard": False} if address == "local" else {}
    for attempt in range(ATTEMPTS):
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **quiet)
            return
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt + 1 == ATTEMPTS:
                raise
            ray.shutdown()


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
