"""An error of the environment is no verdict on what was being done: it is waited for.

A disk that is full, a folder that turned read-only, a database that another process holds: none of them
says anything about a trial, and all of them pass. What meets one says so once, tries again, and gives
up after a stated time, with everything as it was.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from study.spec.config import StudyError

PAUSE, LONGEST_PAUSE = 1.0, 15.0  # seconds before something is tried again, doubled each time
# How SQLite says it, whatever library passes it on; the codes come with Python 3.11.
LOCKED = ("database is locked", "database table is locked", "database schema is locked")
FULL = (
    "database or disk is full",
    "attempt to write a readonly database",
    "disk I/O error",
    "unable to open database file",
)
Done = TypeVar("Done")


def locked_by_another(error: BaseException) -> str | None:
    """In one line, that a database is held by another process; None where the error is another one."""
    return _said(error, lambda one: any(text in str(one) for text in LOCKED))


def of_environment(error: BaseException) -> str | None:
    """In one line, what kept the environment from doing it; None where that is not at fault.

    An OSError is, whatever was made of it on its way; a TimeoutError without a number of the system's
    is not: a program raised it.
    """
    return _said(error, _is_environment)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _is_environment(error: BaseException) -> bool:
    if isinstance(error, TimeoutError) and error.errno is None:
        return False
    return isinstance(error, OSError) or any(text in str(error) for text in (*LOCKED, *FULL))


def _said(error: BaseException, holds: Callable[[BaseException], bool]) -> str | None:
    found = [one for one in _chain(error) if holds(one)]
    if not found:
        return None
    inner = next((one for one in found if isinstance(one, OSError | sqlite3.Error)), found[-1])
    return first_line(inner)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__


def patiently(
    action: Callable[[], Done],
    *,
    patience: float,
    say: Callable[[str], None],
    what: str,
    passes: Callable[[BaseException], str | None] = of_environment,
    given_up: Callable[[], bool] = lambda: False,
) -> Done:
    """Do something that the environment may refuse now, again until it is done.

    Args:
        action: may be called again after it has raised.
        patience: seconds.
        say: told once that it waits, and once that it goes on.
        what: is being done, as a part of a sentence: "write to outputs/digits".
        passes: why an error is one that passes, or None where it is not.
        given_up: whether nobody waits any longer.

    Raises:
        StudyError: it could not be done in time. Nothing that was there is lost.
    """
    since, pause, told = time.monotonic(), PAUSE, False
    while True:
        try:
            done = action()
        except Exception as error:
            if (why := passes(error)) is None:
                raise
            left = patience - (time.monotonic() - since)
            if left <= 0 or given_up():
                raise StudyError(
                    f"Cannot {what} ({why}), after {time.monotonic() - since:.0f} s of waiting; mend "
                    "it, then go on with --resume: what has no record is run again."
                ) from error
            if not told:
                say(
                    f"Cannot {what} ({why}): waiting until it can be done, for {patience:g} s at most; "
                    "then the study stops, and can be gone on with."
                )
                told = True
            _sleep(min(pause, left), given_up)
            pause = min(2 * pause, LONGEST_PAUSE)
        else:
            if told:
                say(f"It was possible again to {what}; going on.")
            return done


def _sleep(seconds: float, given_up: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not given_up():
        time.sleep(min(left, 0.2))
