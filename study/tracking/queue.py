"""MLflow follows the study at its own pace: what it does not take now it is told again, until it does.

The study's folder is the truth and MLflow a copy of it. Every call of `Tracker` may be made twice, so a
call that failed, or whose answer was lost, is simply made again. What could not be told before the end
is told by `--resume`, from the folder.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from study.tracking.mlflow_runs import Tracker

Call = Callable[[], None]
PAUSE = 1.0  # seconds before a call is made again, doubled up to
LONGEST_PAUSE = 15.0
ATTEMPTS = 5  # at one call while others get through


class MlflowQueue:
    """The calls of a `Tracker`, made in order by a thread of their own.

    Args:
        tracker: its study is open.
        on_trouble: called with the error when a call fails and the one before did not.
    """

    def __init__(self, tracker: Tracker, on_trouble: Callable[[Exception], None]) -> None:
        self.tracker, self.on_trouble = tracker, on_trouble
        self._calls: queue.Queue[Call | None] = queue.Queue()
        self._refused: list[Call] = []  # MLflow answers, but not to these
        self._asked = self._told = 0
        self._left = threading.Event()  # nobody waits any longer
        self._heard = time.monotonic()  # when MLflow last took a call
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log_folder(self, folder: Path) -> None:
        """See `Tracker.log_folder`."""
        self._ask(lambda: self.tracker.log_folder(folder))

    def start_trial(self, *args: Any, **kwargs: Any) -> None:
        """See `Tracker.start_trial`."""
        self._ask(lambda: self.tracker.start_trial(*args, **kwargs))

    def end_trial(self, *args: Any, **kwargs: Any) -> None:
        """See `Tracker.end_trial`."""
        self._ask(lambda: self.tracker.end_trial(*args, **kwargs))

    def end_study(self, *args: Any, **kwargs: Any) -> None:
        """See `Tracker.end_study`."""
        self._ask(lambda: self.tracker.end_study(*args, **kwargs))

    def abort(self, *args: Any, **kwargs: Any) -> None:
        """See `Tracker.abort`."""
        self._ask(lambda: self.tracker.abort(*args, **kwargs))

    def _ask(self, call: Call) -> None:
        self._asked += 1
        self._calls.put(call)

    def close(self, patience: Callable[[], float]) -> int:
        """Wait until everything is told, or MLflow has taken nothing for `patience` seconds.

        Args:
            patience: asked again and again: a signal may shorten it.

        Returns:
            How many calls it has not taken.
        """
        self._calls.put(None)
        self._heard = time.monotonic()
        while self._thread.is_alive() and time.monotonic() - self._heard < patience():
            self._thread.join(0.1)
        self._left.set()
        self._thread.join(LONGEST_PAUSE)
        return self._asked - self._told

    def _work(self) -> None:
        """Make all calls in order; those that were refused once more at the end."""
        while (call := self._calls.get()) is not None:
            if not self._made(call):
                return
        for call in self._refused:
            if not self._made(call):
                return

    def _made(self, call: Call) -> bool:
        """Make a call until it is taken or refused; False where nobody waits any longer."""
        pause, refusals, lost = PAUSE, 0, False
        while True:
            try:
                if lost:
                    self.tracker.look()
                    refusals += 1  # it answers, so it is this call that it does not take
                call()
            except Exception as error:
                if not lost:
                    self.on_trouble(error)
                lost = True
                if refusals >= ATTEMPTS:
                    if call not in self._refused:
                        self._refused.append(call)
                    return True
                if self._left.wait(pause):
                    return False
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                self._told += 1
                self._heard = time.monotonic()
                return True
