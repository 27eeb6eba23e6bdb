"""Ctrl-C and SIGTERM: the study ends in good order, and can be gone on with."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class InterruptedStudyError(Exception):
    """A study was ended by a signal, in good order.

    Attributes:
        signal: its number; a command ends with the code 128 + signal.
    """

    def __init__(self, number: int, study: str) -> None:
        name = signal.Signals(number).name
        super().__init__(f"{study} was ended by {name}; go on with --resume {study}.")
        self.signal = number


class Interrupts:
    """Which signal has come, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        tune = signal.getsignal(signal.SIGUSR1)
        again, self.signal = self.signal is not None, number
        if again or not callable(tune):
            raise KeyboardInterrupt
        # Tune ends after its step, and calls no callback for what still runs
        os.kill(os.getpid(), signal.SIGUSR1)

    @contextmanager
    def handled(self) -> Iterator[None]:
        """While Tune runs: the first signal lets it end its step, the second does not."""
        if threading.current_thread() is not threading.main_thread():  # signals are not ours to take
            yield
            return
        before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGUSR1)}
        for number in SIGNALS:
            signal.signal(number, self._heard)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


SIGNALS = (signal.SIGINT, signal.SIGTERM)
