"""Whether Ray is still there: its GCS, and the raylet of this node, each behind a socket."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import ray

TIMES = 2  # looks that must find a Ray of our own gone
GRACE = 30.0  # seconds that the GCS of a cluster has to come back, where it is started again

_looks: list[Callable[[], str | None]] = []  # at the Ray that is joined now


def ray_gone(*, own: bool) -> Callable[[], str | None]:
    """What says why the Ray that is joined now is gone, or None, each time it is called.

    An agent that dies takes its raylet with it, and the raylet of a node its workers.

    Args:
        own: it was started here, and nobody starts it again.
    """
    if _looks:  # at a Ray that was just started here
        return _looks[0]
    here = ray.get_runtime_context()
    places: dict[str, tuple[int, object]] = {}
    host, _, port = str(here.gcs_address).rpartition(":")
    if port.isdecimal():
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        places["its GCS"] = (family, (host.strip("[]"), int(port)))
    for node in ray.nodes():
        if node["NodeID"] == here.get_node_id() and (path := node.get("RayletSocketName")):
            places["the raylet of this node"] = (socket.AF_UNIX, path)
    since: dict[str, float] = {}
    times: dict[str, int] = {}

    def gone() -> str | None:
        for name, (family, address) in places.items():
            if _answers(family, address):
                since.pop(name, None)
                times.pop(name, None)
                continue
            times[name] = times.get(name, 0) + 1
            began = since.setdefault(name, time.monotonic())
            restarted = not own and name == "its GCS"
            if times[name] >= TIMES and (not restarted or time.monotonic() - began >= GRACE):
                return f"{name} has ended"
        return None

    _looks[:] = [gone]
    return gone


def forget() -> None:
    """That Ray is left; nothing is known of another one."""
    _looks.clear()


def is_gone() -> bool:
    """Whether the Ray that `ray_gone` was last asked for is gone, so that an error is no verdict."""
    return any(look() is not None for look in _looks for _ in range(TIMES))


def from_ray(error: BaseException | None) -> bool:
    """Whether an error is Ray's, or follows from one of Ray's."""
    while error is not None:
        if type(error).__module__.split(".")[0] == "ray":
            return True
        error = error.__cause__ or error.__context__
    return False


def _answers(family: int, address: object) -> bool:
    """Whether anybody listens there; who is merely too busy to answer does."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(5)
            connection.connect(address)  # type: ignore[arg-type]
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError:
        return True
    return True
