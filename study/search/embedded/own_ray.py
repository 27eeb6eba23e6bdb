"""A Ray of this process's own: its sessions and its folder are, and it is gone with this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from ray._private import services

from study.search.embedded import folders, remedies
from study.search.embedded.watchdog import LAST_WORDS

# Seconds that `ray.init` has to notice that a program of Ray's is dead: for a raylet it waits 30.
STUCK = {"gcs_server": 10.0, "raylet": 45.0}
SECONDS = 40.0  # for the watchdog, which gives Ray's processes 30


class NotStartedError(Exception):
    """Ray did not come up.

    Args:
        error: what it raised.
        said: what its processes have logged; their folder is gone.
        place: the folder for temporary files that it was to lie in.

    Attributes:
        said, place: the same.
    """

    def __init__(self, error: BaseException, said: str, place: Path) -> None:
        super().__init__(str(error) or type(error).__name__)
        self.said, self.place = said, place


class _Watchdog:
    """The program `watchdog.py`, which has the folder that Ray lies in."""

    def __init__(self, place: Path) -> None:
        self.folder = folders.HeldFolder(place)
        program = Path(__file__).with_name("watchdog.py")
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", str(program), str(self.folder.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        except OSError:
            self.folder.remove()
            raise

    def add(self, session: int) -> None:
        """Watch over a session, too."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(b"%d\n" % session)
            self.process.stdin.flush()
        except BrokenPipeError:  # somebody killed it: Ray's processes end as they would without it
            pass

    def set_last_words(self, text: str) -> None:
        """What it prints where our end of its standard input is closed before `end` is called."""
        path, part = self.folder.path / LAST_WORDS, self.folder.path / f".{LAST_WORDS}"
        with suppress(OSError):  # the disk is full: then there are those of before
            if text:
                part.write_text(text, encoding="utf-8")
                part.replace(path)
            else:
                path.unlink(missing_ok=True)

    def end(self) -> None:
        """Let it clean up."""
        self.set_last_words("")
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(SECONDS)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.folder.remove()


_watchdogs: list[_Watchdog] = []  # of the Ray that runs here
_started: dict[str, subprocess.Popen[Any]] = {}  # of its programs those without which it is none
_last_words: list[str] = [""]


def start(**parameters: Any) -> None:
    """`ray.init` of a new Ray here, which no signal to this process's group reaches.

    A watchdog ends what is left of Ray, and removes its folder, however this process ends. Folders
    of earlier Rays of this user's, whose watchdog was killed too, are removed first.

    Args:
        parameters: of `ray.init`.

    Raises:
        NotStartedError: Ray did not come up.
        StudyError: there is no folder for Ray's sockets.
    """
    folders.sweep()
    place, watchdog = folders.short_folder(), None
    _started.clear()
    try:
        watchdog = _Watchdog(place)
        watchdog.set_last_words(_last_words[0])
        with _sessions_of_their_own(watchdog):
            # Ray opens this folder to everybody, but nobody else gets into the one that it is in
            ray.init("local", _temp_dir=str(watchdog.folder.path / folders.RAY), **parameters)
    except BaseException as error:
        ray.shutdown()
        _started.clear()
        said = ""
        if watchdog is not None:
            said = remedies.logs_of(watchdog.folder.path / folders.RAY)
            watchdog.end()
        if isinstance(error, Exception):
            raise NotStartedError(error, said, place) from error
        raise
    _watchdogs.append(watchdog)


def set_last_words(text: str) -> None:
    """What is said on standard error should this process end without a word: killed, or by Ray.

    Ray itself ends a process that it has joined where the raylet has gone that it asks for an object.
    """
    _last_words[0] = text
    for watchdog in _watchdogs:
        watchdog.set_last_words(text)


@contextmanager
def guarded() -> Iterator[None]:
    """While Ray starts: where one of its programs dies, and Ray waits for it without an end, this
    process says so and ends; nothing else can interrupt `ray.init`."""
    over = threading.Event()
    thread = threading.Thread(target=_guard, args=(over,), name="watch Ray start", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _guard(over: threading.Event) -> None:
    dead: dict[int, float] = {}
    while not over.wait(0.5):
        for name, process in tuple(_started.items()):
            if process.poll() is None:
                continue
            began = dead.setdefault(process.pid, time.monotonic())
            if time.monotonic() - began >= STUCK[name]:
                why = f"{name} ended with code {process.returncode} while it started"
                set_last_words("")  # these are the last
                print(f"error: Ray died ({why}).", file=sys.stderr, flush=True)
                os._exit(1)


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

        more["pass_fds"] = (*more.get("pass_fds", ()), watchdog.folder.descriptor)
        process = popen(*args, start_new_session=True, preexec_fn=before_it_runs, **more)
        watchdog.add(process.pid)
        if (name := Path(args[0][0]).name) in STUCK:
            _started[name] = process
        return process

    with mock.patch.object(services, "ConsolePopen", in_a_session):
        yield
