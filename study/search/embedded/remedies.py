"""Why Ray did not start here, or was not joined, and what to do about that cause."""

from __future__ import annotations

import re
from pathlib import Path

LOGS = ("gcs_server", "raylet", "dashboard_agent", "runtime_env_agent", "dashboard")
TAIL = 20_000  # bytes of a log's end that are looked at
LONGEST = 200  # characters of a reason
ERROR = (
    re.compile(  # a line of level error or fatal, of Ray's two kinds of logs, or of the system's own
        r"^\[[^]]* [EFC] \d+ |^\d{4}-\S+ \S+\s(ERROR|CRITICAL)\s|"
        r"^(?!\[|\d{4}-).*(rror|xception|failed|bad_alloc|what\(\)|[Cc]annot|No space|in use)"
    )
)

BUSY = (
    r"timed out|[Tt]imeout|did not (come up|register)|unable to (start|connect)",
    "this machine is too busy: start again when it has less to do",
)
PORT = (
    r"Address already in use|Errno 98|port .{0,40} in use",
    "another program took a port that Ray had chosen: start again",
)
# What Ray, its libraries or the system say of a cause, and what to do about it; the first that fits.
# What is full or missing comes first: other causes follow from it.
HERE = (
    (
        r"No space left on device|Errno 28|No usable temporary directory|Disk quota exceeded",
        "free some of the disk that {place} is on, or set RAY_TMPDIR to a folder on another one",
    ),
    (
        r"Read-only file system|Permission denied|Errno 13|Errno 30",
        "set RAY_TMPDIR to a folder that you may write to",
    ),
    (
        r"AF_UNIX path|path too long|File name too long|Errno 36",
        "set RAY_TMPDIR to a folder with a short name",
    ),
    (
        r"Too many open files|Errno 24",
        "raise the limit of open files with `ulimit -n 65536`",
    ),
    (
        r"Resource temporarily unavailable|can't start new thread|pthread_create|Errno 11\b|"
        r"thread: Resource",
        "raise the limit of processes and threads with `ulimit -u`, or that of the container",
    ),
    (
        r"bad_alloc|Cannot allocate memory|Errno 12\b|MemoryError|OutOfMemory|object store memory|"
        r"memory on this node available",
        "end what takes this machine's memory, or raise the limit that `ulimit -v` or a container sets",
    ),
    (
        r"/dev/shm",
        "mount /dev/shm with at least 100 MB (a container takes --shm-size=2g, or --ipc=host)",
    ),
    PORT,
    BUSY,
)
MAY_PASS = (BUSY[1], PORT[1])
THERE = (
    (
        r"[Vv]ersion mismatch",
        "install here the versions of Ray and Python that the cluster has, or leave the address out to "
        "run here",
    ),
    (
        r"[Uu]nauthenticated|UNAUTHENTICATED|[Aa]uthenticat|auth_token|[Tt]oken",
        "set RAY_AUTH_MODE=token, and put the cluster's token into ~/.ray/auth_token",
    ),
    (
        r"Name or service not known|nodename nor servname|name resolution|Errno -[235]\b",
        "there is no such machine: look at the address",
    ),
    (
        r"refused|none of yours|unreachable|No route",
        "start it with `ray start --head`, or leave the address out to run here",
    ),
)
WHATEVER_HERE = (
    "look at Ray's own words above; --address joins a Ray that `ray start --head` has started"
)
WHATEVER_THERE = (
    "see that a Ray runs there (`ray status --address ADDRESS`), or leave the address out to run here"
)
PREFIX = re.compile(r"^\[[^]]*\] (\(\w+\) )?\S+: +")  # of a line of Ray's logs


def started(error: BaseException, logs: str, place: Path) -> str:
    """A sentence on a Ray that could not be started here.

    Args:
        logs: what its processes have said.
        place: the folder for temporary files that it was to lie in.
    """
    line, remedy = _found(error, logs, HERE) or (_line(error), WHATEVER_HERE)
    return f"Cannot start Ray on this machine ({line}); {remedy.format(place=place)}."


def may_pass(error: BaseException, logs: str) -> bool:
    """Whether a busy machine or a port kept Ray from starting, so that it is worth another try."""
    found = _found(error, logs, HERE)
    return found is not None and found[1] in MAY_PASS


def joined(error: BaseException, address: str) -> str:
    """A sentence on a Ray at an address that could not be joined."""
    line, remedy = _found(error, "", THERE) or (_line(error), WHATEVER_THERE)
    return f"Cannot join Ray at {address} ({line}); {remedy}."


def logs_of(folder: Path) -> str:
    """The ends of the logs of all processes of the Ray that lies in a folder."""
    found = []
    for path in sorted(folder.glob("session_2*/logs/*")):
        if path.is_file() and path.name.startswith(LOGS):
            try:
                with path.open("rb") as file:
                    file.seek(max(0, path.stat().st_size - TAIL))
                    found.append(file.read().decode(errors="replace"))
            except OSError:
                continue
    return "\n".join(found)


def _found(
    error: BaseException, logs: str, causes: tuple[tuple[str, str], ...]
) -> tuple[str, str] | None:
    """The line that names a cause, and its remedy, by the order of the causes."""
    lines = [*_chain(error).splitlines(), *filter(ERROR.search, logs.splitlines())]
    for pattern, remedy in causes:
        for line in lines:
            if re.search(pattern, line):
                return PREFIX.sub("", line.strip())[:LONGEST], remedy
    return None


def _chain(error: BaseException | None) -> str:
    said: list[str] = []
    while error is not None and len(said) < 20:
        said.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(said)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:LONGEST]
