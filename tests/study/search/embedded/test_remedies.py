"""What a Ray that did not start, or was not joined, is said to need: by its cause."""

import errno
import os
import socket
from pathlib import Path

import pytest

from study.search import cluster
from study.search.embedded import own_ray, remedies
from study.spec.config import StudyError

ROOT = Path(__file__).parents[4]
PLACE = Path("/somewhere")


def raised(number):
    return OSError(number, os.strerror(number), "/somewhere/else")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (raised(errno.ENOSPC), "free some of the disk that /somewhere is on"),
        (raised(errno.EDQUOT), "free some of the disk that /somewhere is on"),
        (raised(errno.EROFS), "set RAY_TMPDIR to a folder that you may write to"),
        (raised(errno.EACCES), "set RAY_TMPDIR to a folder that you may write to"),
        (OSError("AF_UNIX path length cannot exceed 107 bytes: '/a'"), "with a short name"),
        (raised(errno.EMFILE), "ulimit -n"),
        (raised(errno.EAGAIN), "ulimit -u"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (raised(errno.ENOMEM), "memory"),
        (
            ValueError(
                "After taking into account object store and redis memory usage, the amount of memory "
                "on this node available for tasks and actors (-1 GB) is less than 0%"
            ),
            "memory",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/dev/shm"), "mount /dev/shm"),
        (raised(errno.EADDRINUSE), "start again"),
        (RuntimeError("The current node timed out during startup."), "too busy"),
        (RuntimeError("Something else"), "look at Ray's own words"),
    ],
)
def test_a_ray_that_did_not_start_needs_what_its_cause_needs(error, remedy):
    sentence = remedies.started(error, "", PLACE)
    assert remedy in sentence
    assert sentence.startswith("Cannot start Ray on this machine (")
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_what_rays_processes_log_tells_the_cause_where_python_does_not(tmp_path):
    logs = tmp_path / "session_2026-01-01/logs"
    logs.mkdir(parents=True)
    (logs / "gcs_server.err").write_text("x" * 50_000 + "\nbind: Address already in use\n")
    (logs / "worker-1.out").write_text("No space left on device\n")  # of a program that it ran
    error = RuntimeError("Ray did not say why")
    error.__cause__ = ConnectionError("nor did this")
    sentence = remedies.started(error, remedies.logs_of(tmp_path), PLACE)
    assert "Address already in use" in sentence
    assert "start again" in sentence
    assert len(sentence) < 500


def test_a_raylet_without_memory_is_no_machine_that_is_busy():
    """What a raylet logged under `ulimit -v`, while Ray raised that it took too long."""
    error = RuntimeError("The current node timed out during startup.")
    logs = (
        "[2026-11-30 12:56:22,625 I 20182 20182] (raylet) store_runner.cc:66: Starting object store "
        "with directory /dev/shm, fallback /tmp/r\n"
        "[2026-11-30 12:56:22,625 E 20182 20196] (raylet) dlmalloc.cc:215: mmap failed with error: "
        "Cannot allocate memory\n"
        "[2026-11-30 12:56:22,672 C 20182 20196] (raylet) plasma_allocator.cc:79: Check failed: It's "
        "likely we don't have enough space in /dev/shm\n"
    )
    sentence = remedies.started(error, logs, PLACE)
    assert "(mmap failed with error: Cannot allocate memory); end what takes" in sentence
    assert not remedies.may_pass(error, logs), "it is not tried again"
    assert remedies.may_pass(error, "")


def test_what_ray_warns_of_and_tries_again_is_no_cause():
    """An agent's log beside a raylet that was killed while Ray started."""
    error = RuntimeError("The current node timed out during startup.")
    logs = (
        "2026-11-30 14:08:44,178\tWARNING http_server_agent.py:79 -- Failed to bind to port 52365 "
        "(attempt 1/6). Retrying in 0.14s. Error: [Errno 98] error while attempting to bind\n"
    )
    assert "too busy" in remedies.started(error, logs, PLACE)
    assert remedies.may_pass(error, logs)
    assert "took a port" in remedies.started(error, logs.replace("WARNING", "ERROR"), PLACE)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "ray start --head"),
        (socket.gaierror(-2, "Name or service not known"), "no such machine"),
        (RuntimeError("Version mismatch: The cluster was started with: Ray: 2.9"), "versions of Ray"),
        (RuntimeError("Unauthenticated: invalid token"), "RAY_AUTH_MODE=token"),
        (TimeoutError("timed out"), "ray status"),
    ],
)
def test_a_ray_that_is_not_joined_needs_what_its_cause_needs(error, remedy):
    sentence = remedies.joined(error, "10.0.0.5:6379")
    assert remedy in sentence
    assert "10.0.0.5:6379" in sentence


def test_a_disk_that_is_full_is_named(monkeypatch):
    """The first thing that a start writes is its folder."""

    def full(*_, **__):
        raise raised(errno.ENOSPC)

    monkeypatch.setattr(own_ray.folders.tempfile, "mkdtemp", full)
    with pytest.raises(StudyError, match=r"Cannot start Ray .*No space left.*set RAY_TMPDIR"):
        cluster.start_ray("local")


def test_a_folder_with_a_long_name_is_named(monkeypatch):
    monkeypatch.setattr(own_ray.folders, "LONGEST", 5)
    with pytest.raises(StudyError, match="^Got no folder for Ray's sockets"):
        cluster.start_ray("local")
