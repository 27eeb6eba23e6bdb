"""Optuna's database, which another process may hold, a disk may refuse, or garbage may be in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import optuna
from sqlalchemy.exc import SQLAlchemyError

from study.spec.config import StudyError
from study.store.databases import sqlite_path
from study.store.environment import first_line, of_environment, patiently

Done = TypeVar("Done")


class OptunaDoor:
    """Waits for a storage, says so once, and gives up after a while.

    Args:
        storage: Optuna's storage URL, None for one in memory.
        patience: seconds.
        say: told in a sentence.
        given_up: whether nobody waits any longer.
    """

    def __init__(
        self,
        storage: str | None,
        patience: float,
        say: Callable[[str], None],
        given_up: Callable[[], bool],
    ) -> None:
        self.what = f"Optuna's database {sqlite_path(storage or '') or storage}"
        self.patience, self.say, self.given_up = patience, say, given_up
        self.since: float | None = None

    def patiently(self, action: Callable[[], Done]) -> Done:
        """Do something with the storage, which may be done twice.

        Raises:
            StudyError: the storage cannot be read, or is not let go of in time.
        """
        try:
            return patiently(
                action,
                patience=self.patience,
                say=self.say,
                what=f"use {self.what}",
                given_up=self.given_up,
            )
        except (optuna.exceptions.StorageInternalError, SQLAlchemyError, RuntimeError) as error:
            raise StudyError(
                f"{self.what} cannot be read ({first_line(error.__cause__ or error)}); put it back as "
                "it was, or start a new study under another --name."
            ) from error

    def refused(self, error: Exception) -> None:
        """The storage did not do what it was asked for, and will be asked again.

        Raises:
            StudyError: that has been so for too long, or will stay so.
        """
        now, why = time.monotonic(), of_environment(error)
        shown = why or first_line(error.__cause__ or error)
        if self.since is None:
            self.since = now
            self.say(
                f"{self.what} does not let us in ({shown}): waiting for {self.patience:g} s at most; "
                "then the study stops, and can be gone on with."
            )
        if why is None or now - self.since >= self.patience:
            raise StudyError(
                f"{self.what} does not let us in ({shown}); mend it, then go on with --resume: what "
                "has no record is run again."
            ) from error

    def let_in(self) -> None:
        """The storage did what it was asked for."""
        if self.since is not None:
            self.say(f"{self.what} lets us in again; going on.")
        self.since = None
