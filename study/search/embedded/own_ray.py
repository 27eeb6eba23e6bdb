"""A Ray of this process's own: its sessions and its folder are, and it is gone with this process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from ray._private import services

from study.spec.config import StudyError

# Ray's sockets are FOLDER/session_DATE_PID/sockets/plasma_store, and a socket's path has 107 characters
# on Linux, 103 elsewhere, of which Ray's part takes 64.
LONGEST = (107 if sys.platform.startswith("linux") else 103) - 64
PREFIX, RAY = "bimask-", "r"  # our folder, and Ray's in it
OURS = len(f"/{PREFIX}12345678/{RAY}")
SECONDS = 40.0  # for the watchdog, which gives Ray's processes 30


class _Watchdog:
    """The program `watchdog.py`, which has the folder that Ray lies in."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=short_folder()))
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("watchdog.py")), str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def add(self, session: int) -> None:
        """Watch over a session, too."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(b"%d\n" % session)
            self.process.stdin.flush()
        except BrokenPipeError:  # somebody killed it: Ray's processes end as they would without it
            pass

    def end(self) -> None:
        """Let it clean up."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(SECONDS)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_watchdogs: list[_Watchdog] = []  # of the Ray that runs here


def start(**parameters: Any) -> None:
    """`ray.init` of a new Ray here, which no signal to this process's group reaches.

    A watchdog ends what is left of Ray, and removes its folder, however this process ends.

    Args:
        parameters: of `ray.init`.

    Raises:
        StudyError: there is no folder for Ray's sockets.
    """
    watchdog = _Watchdog()
    try:
        with _sessions_of_their_own(watchdog):
            # Ray opens this folder to everybody, but nobody else gets into the one that it is in
            ray.init("local", _temp_dir=str(watchdog.folder / RAY), **parameters)
    except BaseException:
        ray.shutdown()
        watchdog.end()
        raise
    _watchdogs.append(watchdog)


def stop() -> None:
    """Leave Ray; one that was started here ends, and its folder is removed."""
    try:
        ray.shutdown()
    finally:
        while _watchdogs:
            _watchdogs.pop().end()


@contextmanager
def _sessions_of_their_own(watchdog: _Watchdog) -> Iterator[None]:
    """What Ray starts meanwhile leads a session of its own.

    Ray has no setting for it. A signal to this process's group (Ctrl-C, `timeout`, a terminal that is
    closed) would end Ray before this process could end the study.
    """
    popen = services.ConsolePopen

    def in_a_session(*args: Any, **more: Any) -> Any:
        ray_does = more.pop("preexec_fn", None)

        def before_it_runs() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())  # this process may have blocked some
            if ray_does is not None:
                ray_does()

        process = popen(*args, start_new_session=True, preexec_fn=before_it_runs, **more)
        watchdog.add(process.pid)
        return process

    with mock.patch.object(services, "ConsolePopen", in_a_session):
        yield


def short_folder() -> Path:
    """A folder for temporary files in which the paths of Ray's sockets are short enough.

    RAY_TMPDIR and the usual one come first, others where these are too long.

    Raises:
        StudyError: there is none.
    """
    wanted = [os.environ.get("RAY_TMPDIR"), tempfile.gettempdir()]
    for name in (*wanted, "/tmp", "/var/tmp", "/dev/shm"):
        if name is None:
            continue
        folder = Path(name).absolute()
        room = LONGEST - len(str(folder)) - OURS
        if room >= 0 and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise StudyError(
        f"Got no folder for Ray's sockets: {tempfile.gettempdir()} is too long or cannot be written "
        f"to, expected one of at most {LONGEST - OURS} characters; set RAY_TMPDIR to one."
    )
