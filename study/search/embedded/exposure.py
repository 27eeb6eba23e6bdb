"""Ray on this machine: a study's own is closed to everybody else, and another user's is not joined.

A Ray runs the code of whoever may tell it to, so a study's own is kept from others twice: it listens on
loopback alone, and it does nothing for those who do not know its token. The token is made anew for each
Ray, and only the environment of its processes holds it: no file does.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private import ray_constants
from ray._private.authentication import authentication_token_setup
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from study.spec.config import StudyError

LOOPBACK = "127.0.0.1"
MODE, TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
# What Ray calls its support of clusters on Windows and macOS. Without it the node's address is
# loopback, and every server of the node binds to it. Ray replaces `_node_ip_address="127.0.0.1"` by
# the machine's address, and with another one in 127.0.0.0/8 its servers bind to all addresses.
CLUSTERS = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
# Exporters of metrics answer without a token.
NO_METRICS = {
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}
LISTENING = "0A"  # in /proc/net/tcp
HOST_AND_PORT = re.compile(r"[\w.:\[\]-]{1,255}:\d{1,5}", re.ASCII)

_before: dict[str, str | None] = {}  # the environment's own values, while a Ray of ours runs


def close() -> None:
    """Set what the next Ray that is started here reads: loopback alone, and a token."""
    closed = {MODE: "token", TOKEN: secrets.token_hex(32), CLUSTERS: "0", **NO_METRICS}
    for name in closed:
        _before.setdefault(name, os.environ.get(name))
    os.environ |= closed
    ray_constants.ENABLE_RAY_CLUSTER = False  # it was read when Ray was imported
    _read_again()


def require_closed() -> None:
    """Look whether the Ray that was started is what `close` asked for.

    Raises:
        StudyError: it listens on another address than loopback.
    """
    if (address := ray.util.get_node_ip_address()) != LOOPBACK:
        raise StudyError(
            f"The Ray that was started here listens on {address}, not on loopback alone; install a "
            "release of Ray that bimask was tried with (`pip install 'ray[default,tune]==2.60.0'`)."
        )


def restore() -> None:
    """Give the environment the values that it had before `close`, once that Ray has ended."""
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if _before:
        ray_constants.ENABLE_RAY_CLUSTER = not ray_constants.IS_WINDOWS_OR_OSX
        _read_again()
        _before.clear()


def _read_again() -> None:
    """Ray keeps mode and token from when it first read them."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def use_token_of_user() -> None:
    """Where the user has a token for Ray and the environment says nothing, it is shown when joining.

    Ray does so by itself where it looks for the cluster, but not where it is told the address.
    """
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def protect_token_file() -> None:
    """Take the user's token for Ray from the eyes of others: Ray writes it for everyone to read."""
    with contextlib.suppress(OSError, RuntimeError):  # none, or no home
        path = Path.home() / ".ray" / "auth_token"
        for place, mode in ((path, 0o600), (path.parent, 0o700)):
            found = place.lstat()
            if found.st_uid == os.getuid() and found.st_mode & 0o077 and not place.is_symlink():
                place.chmod(mode)


@dataclass(frozen=True)
class LeftRay:
    """A Ray that `ray start` left on this machine.

    Attributes:
        address: HOST:PORT of its control service.
        owner: name of the other user whose it is, or None where it is this user's own.
    """

    address: str
    owner: str | None


def left_here() -> LeftRay | None:
    """What `ray start` says that it left here, in the file that `ray.init` reads.

    Every user of the machine may write to the folder of this file, so it counts for as much as its
    owner; and the port it names may be somebody else's by now.
    """
    linux = os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None  # as Ray has it
    temporary = os.environ.get("RAY_TMPDIR") or linux or "/tmp"
    path = Path(temporary) / "ray" / "ray_current_cluster"
    try:
        with open(path, opener=_open_itself) as file:
            found = os.fstat(file.fileno())
            address = file.read(256).strip() if stat.S_ISREG(found.st_mode) else ""
    except (OSError, UnicodeDecodeError):
        return None
    if not HOST_AND_PORT.fullmatch(address):  # a stranger's text, which is shown
        return None
    owners = {found.st_uid} | _listeners(address)
    others = owners - {os.getuid()}
    return LeftRay(address, _name(min(others)) if others else None)


def _open_itself(name: str, flags: int) -> int:
    """Neither where a link leads, nor a pipe that would be waited for."""
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _listeners(address: str) -> set[int]:
    """The users who listen at HOST:PORT, where HOST is this machine and its system says so (Linux)."""
    host, _, port = address.rpartition(":")
    if not _is_here(host.strip("[]")):
        return set()
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == LISTENING and int(words[1].rpartition(":")[2], 16) == int(port):
                    found.add(int(words[7]))
    return found


def _is_here(host: str) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((host, 0))
        return True
    except OSError:
        return False


def _name(user: int) -> str:
    import pwd  # no Windows has it

    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)
