"""Where a Ray of our own lies, what ends it, and what an error of a dead one is."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from study.search.embedded import folders, liveness, own_ray, watchdog
from study.search.interrupts import WAKE, Interrupts

SLEEPER = "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"


def test_the_watchdog_kills_whole_sessions_and_removes_the_folder_when_its_writer_is_gone(tmp_path):
    (tmp_path / "place" / "session").mkdir(parents=True)
    watched = subprocess.Popen([sys.executable, "-c", SLEEPER], start_new_session=True)
    dog = subprocess.Popen(
        [sys.executable, "-I", watchdog.__file__, str(tmp_path / "place")], stdin=subprocess.PIPE
    )
    dog.stdin.write(b"%d\n" % watched.pid)
    dog.stdin.flush()
    deadline = time.monotonic() + 60
    while len(watchdog.members({watched.pid})) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    dog.stdin.close()
    assert dog.wait(60) == 0
    assert watched.wait(60) == -signal.SIGKILL
    assert watchdog.members({watched.pid}) == []
    assert not (tmp_path / "place").exists()


def test_the_watchdog_says_what_its_writer_can_say_no_longer(tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / watchdog.LAST_WORDS).write_text("go on with --resume s\u00fc")
    words = [sys.executable, "-I", watchdog.__file__, str(tmp_path / "place")]
    done = subprocess.run(words, input=b"", capture_output=True, timeout=60)
    assert done.stderr.decode() == "go on with --resume s\u00fc\n"


def test_an_end_in_good_order_leaves_nothing_to_be_said(tmp_path, monkeypatch, capfd):
    dog = own_ray._Watchdog(tmp_path)
    monkeypatch.setattr(own_ray, "_watchdogs", [dog])
    own_ray.set_last_words("it was killed")
    assert (dog.folder.path / watchdog.LAST_WORDS).read_text() == "it was killed"
    own_ray.set_last_words("it was killed, with a front")
    dog.end()
    assert not dog.folder.path.exists()
    assert capfd.readouterr().err == ""


def test_what_ray_starts_leads_a_session_of_its_own(tmp_path):
    """Ray starts all its processes through one name of its own, which is not public."""

    class Dog:
        def __init__(self):
            self.sessions = []
            self.folder = folders.HeldFolder(tmp_path)

        def add(self, session):
            self.sessions.append(session)

    dog = Dog()
    with own_ray._sessions_of_their_own(dog):
        started = own_ray.services.start_ray_process(["sleep", "600"], "sleeper", fate_share=True)
    try:
        assert os.getsid(started.process.pid) == started.process.pid
        assert dog.sessions == [started.process.pid]
        os.close(dog.folder.descriptor)
        folders._remove_if_left(dog.folder.path)
        assert dog.folder.path.exists(), "what Ray started holds the folder as well"
    finally:
        started.process.kill()
        started.process.wait()


def test_a_socket_without_a_listener_is_gone_and_one_that_is_busy_is_not(tmp_path):
    path = str(tmp_path / "raylet")
    assert not liveness._answers(socket.AF_UNIX, path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(0)
        assert liveness._answers(socket.AF_UNIX, path)
    assert not liveness._answers(socket.AF_UNIX, path)


def test_the_first_signal_stops_what_runs_and_one_right_after_it_is_the_same():
    """`timeout` sends SIGTERM to the process, and at once to its whole group."""
    interrupts = Interrupts()
    with interrupts.handled():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert interrupts.signal == signal.SIGTERM
    assert not interrupts.again


def test_what_is_being_written_down_is_finished_first():
    interrupts = Interrupts()
    with interrupts.handled():
        with interrupts.hold():
            signal.raise_signal(signal.SIGHUP)
            interrupts.lost = "its GCS has ended"
            signal.raise_signal(WAKE)
        assert interrupts.signal == signal.SIGHUP
        interrupts._at = 0.0
        with interrupts.hold(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
    assert interrupts.again


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    interrupts = Interrupts()
    try:
        with interrupts.handled():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert interrupts.signal is None


def test_a_ray_that_is_gone_ends_what_waits_for_it():
    interrupts = Interrupts()
    with (
        interrupts.handled(),
        interrupts.watch(lambda: "its GCS has ended", at_worst=lambda: None),
        pytest.raises(KeyboardInterrupt),
    ):
        time.sleep(60)
    assert interrupts.lost == "its GCS has ended"


def test_where_the_main_thread_hears_nothing_the_study_is_ended_by_another(monkeypatch):
    monkeypatch.setattr("study.search.interrupts.STUCK", 0.0)
    monkeypatch.setattr("study.search.interrupts.INSIST", 0.05)
    interrupts, ended = Interrupts(), threading.Event()
    with interrupts.handled(), interrupts.watch(lambda: "its GCS has ended", at_worst=ended.set):
        signal.pthread_sigmask(signal.SIG_BLOCK, [WAKE])  # as a call that is not left
        try:
            assert ended.wait(60)
        finally:
            interrupts.lost = None
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [WAKE])


def test_signals_wait_while_ray_starts_and_are_then_heard():
    interrupts = Interrupts()

    def start():
        with interrupts.defer():
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # another thread would die of it
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what `ray.init` does, in its way
            time.sleep(0.05)

    with interrupts.handled(), pytest.raises(KeyboardInterrupt):
        start()
    assert interrupts.signal == signal.SIGTERM


def test_a_signal_that_a_thread_of_a_library_takes_waits_as_well():
    interrupts, started = Interrupts(), []

    def start():
        with interrupts.defer():
            signal.pthread_kill(other.ident, signal.SIGTERM)
            while interrupts.signal is None:
                time.sleep(0.01)
            started.append(True)

    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    try:
        with interrupts.handled(), pytest.raises(KeyboardInterrupt):
            start()
    finally:
        over.set()
        other.join()
    assert started == [True]
