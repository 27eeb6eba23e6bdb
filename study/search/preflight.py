"""Before the first trial every node is asked whether it can do its part."""

from __future__ import annotations

import shutil
import socket
import tempfile
import uuid
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from study.search import storage as storages
from study.spec.config import StudyConfig, StudyError
from study.store.provenance import sources, versions

PATIENCE = 600.0  # seconds for a node to answer: it imports torch, perhaps beside other work
LEAST_FREE = 2 * 2**30  # bytes on a node's temporary disk, where Ray spills and trials write
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class NodeReport:
    """What a node says of itself.

    Attributes:
        versions: as `study.store.provenance.versions`.
        sources: digest of the project's sources that it runs.
        gpus: how many torch can use.
        free: bytes on the temporary disk.
        storage: why the common storage cannot be used, or "".
        server: why MLflow cannot be reached, or "".
    """

    versions: dict[str, str]
    sources: str
    gpus: int
    free: int
    storage: str
    server: str


def examine(storage: str, server: tuple[str, int] | None, name: str) -> NodeReport:
    """Run on the node in question.

    Args:
        storage: holds the driver's file `driver`; gets one called `name`.
        server: host and port that must answer.
    """
    try:
        storages.read(storage, "driver")
        storages.write(storage, name, name)
        problem = ""
    except FileNotFoundError:
        problem = "what the driver wrote there is not there"
    except OSError as error:
        problem = _short(error)
    unreachable = ""
    if server is not None:
        try:
            socket.create_connection(server, timeout=10).close()
        except OSError as error:
            unreachable = _short(error)
    return NodeReport(
        versions=versions(),
        sources=sources(),
        gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        free=shutil.disk_usage(tempfile.gettempdir()).free,
        storage=problem,
        server=unreachable,
    )


def check_nodes(config: StudyConfig, storage: str, tracking: str, *, own: bool = False) -> int:
    """Ask all nodes that are up; those that come later are taken as they are.

    Args:
        own: the only node is this process's own, which answers for it at once.
        storage: where trials will leave their checkpoints.
        tracking: MLflow's URI. One on loopback is the driver's alone, which is the only writer.

    Returns:
        How many nodes there are.

    Raises:
        StudyError: one sentence for each thing that would make trials fail, with the node's address.
    """
    probe = f"{storage}/.probe-{uuid.uuid4().hex[:8]}"
    try:
        storages.write(probe, "driver", "driver")
    except (OSError, ValueError) as error:
        raise StudyError(
            f"The driver cannot write to the storage {storage} ({_short(error)}); give another with "
            "--storage, or mend its rights."
        ) from error
    nodes = [node for node in ray.nodes() if node["Alive"]]
    try:
        ask = _answer_here if own else _ask
        asked = {node["NodeID"]: ask(node["NodeID"], probe, _server(tracking)) for node in nodes}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=PATIENCE)
        found = [line for node in nodes for line in _answer(config, node, asked, probe, storage)]
    finally:
        storages.remove(probe)
    if found:
        raise StudyError(*found)
    return len(nodes)


def _ask(node: str, probe: str, server: tuple[str, int] | None) -> Any:
    here = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    task = ray.remote(examine).options(num_cpus=0, scheduling_strategy=here, max_retries=2)
    return task.remote(probe, server, node)


def _answer_here(node: str, probe: str, server: tuple[str, int] | None) -> Any:
    return ray.put(examine(probe, server, node))


def _server(uri: str) -> tuple[str, int] | None:
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or parts.hostname in (None, *LOOPBACK):
        return None
    return str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)


def _answer(
    config: StudyConfig, node: dict[str, Any], asked: dict[str, Any], probe: str, storage: str
) -> list[str]:
    name, answer = f"Node {node['NodeManagerAddress']}", asked[node["NodeID"]]
    try:
        report: NodeReport = ray.get(answer, timeout=0.1)
    except ray.exceptions.GetTimeoutError:
        return [f"{name} did not answer within {PATIENCE:.0f} s; look at `ray status`, or remove it."]
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines()  # of a task's error the last is the reason
        reason = lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0][:200]
        return [f"{name} cannot run the project ({reason}); set it up with cluster/node.sh."]
    try:
        storages.read(probe, node["NodeID"])
        unseen = ""
    except OSError:
        unseen = "what it wrote there does not reach the driver"
    return problems(config, name, node["Resources"], report, storage=storage, unseen=unseen)


def problems(
    config: StudyConfig,
    name: str,
    resources: dict[str, float],
    report: NodeReport,
    *,
    storage: str,
    unseen: str = "",
) -> list[str]:
    """What is wrong with a node, one sentence each; versions and sources are held against the driver's.

    Args:
        resources: what Ray says that it offers.
        unseen: why the driver does not see what the node wrote, or "".
    """
    found = []
    for package, here in versions().items():
        if package in ("python", "bimask"):  # bimask counts by its sources
            continue
        if (there := report.versions.get(package, "none")) != here:
            found.append(
                f"{name} has {package} {there}, the driver {here}; install one on all nodes "
                "(cluster/constraints.txt)."
            )
    if report.sources != sources():
        found.append(f"{name} runs other sources of the project than the driver; send it the same.")
    offered = resources.get("GPU", 0)
    if config.gpus_per_trial and report.gpus < offered:
        found.append(
            f"{name} offers {offered:g} GPU(s), but torch can use {report.gpus}; its driver and "
            "torch's CUDA must fit (`nvidia-smi`, `python -m torch.utils.collect_env`)."
        )
    if reason := report.storage or unseen:
        found.append(
            f"{name} does not share the storage {storage} ({reason}); give one that all nodes reach "
            "with --storage."
        )
    if report.server:
        found.append(
            f"{name} cannot reach MLflow ({report.server}); mend MLFLOW_TRACKING_URI, or the way there."
        )
    if report.free < LEAST_FREE:
        found.append(
            f"{name} has {report.free / 2**30:.1f} GB left in {tempfile.gettempdir()}, "
            f"{LEAST_FREE / 2**30:.0f} are needed; make room there."
        )
    return found


def _short(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
