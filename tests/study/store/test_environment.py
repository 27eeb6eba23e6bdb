"""What is an error of the environment, and how it is waited for."""

import errno
import sqlite3

import pytest
from sqlalchemy.exc import OperationalError

from study.spec.config import StudyError
from study.store import environment
from study.store.environment import locked_by_another, of_environment, patiently

FULL = OSError(errno.ENOSPC, "No space left on device")


def raised_from(outer, inner):
    try:
        raise outer from inner
    except type(outer) as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EROFS, "Read-only file system"),
        PermissionError(errno.EACCES, "Permission denied"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
        raised_from(StudyError("Cannot write"), FULL),
        OperationalError("x", {}, sqlite3.OperationalError("database is locked")),
        raised_from(RuntimeError("commit"), sqlite3.OperationalError("database or disk is full")),
    ],
    ids=str,
)
def test_an_error_of_the_environment(error):
    assert of_environment(error)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("loss is nan"),
        MemoryError(),
        TimeoutError("took longer than `trial_timeout` allows"),
        sqlite3.DatabaseError("file is not a database"),
        RuntimeError("CUDA out of memory"),
    ],
    ids=repr,
)
def test_what_is_a_verdict(error):
    assert of_environment(error) is None


def test_a_full_disk_is_no_lock():
    assert locked_by_another(FULL) is None
    assert locked_by_another(sqlite3.OperationalError("database is locked")) == "database is locked"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(environment, "PAUSE", 0.001)


def test_what_passes_is_waited_for_and_said_once(tmp_path):
    said, tries = [], []

    def action():
        tries.append(1)
        if len(tries) < 5:
            raise FULL
        return "done"

    assert patiently(action, patience=60, say=said.append, what="write to outputs/s") == "done"
    assert len(tries) == 5
    assert [text.split(":")[0] for text in said] == [
        "Cannot write to outputs/s ([Errno 28] No space left on device)",
        "It was possible again to write to outputs/s; going on.",
    ]


def test_what_does_not_pass_ends_after_the_stated_time():
    def action():
        raise FULL

    with pytest.raises(StudyError, match=r"Cannot write .*No space left.*--resume"):
        patiently(action, patience=0.01, say=lambda _: None, what="write")
    with pytest.raises(StudyError, match="Cannot write"):
        patiently(action, patience=60, say=lambda _: None, what="write", given_up=lambda: True)


def test_another_error_is_raised_at_once():
    def action():
        raise ValueError("nan")

    with pytest.raises(ValueError, match="nan"):
        patiently(action, patience=60, say=pytest.fail, what="write")
