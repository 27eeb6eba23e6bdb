"""Signals, and a Ray that is lost: the study ends in good order, and can be gone on with."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from bimask.errors import BimaskError
from bimask.progress import Console
from study.search.embedded import own_ray
from study.search.embedded.liveness import from_ray
from study.spec.config import StudyError

GO_ON = "; mend it, then go on with --resume NAME."  # what has a record is kept
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WAKE = signal.SIGUSR2  # a thread of ours to the main one: look again
SAME = 2.0  # seconds in which a second signal is the first: `timeout` sends two, to us and to our group
PATIENCE = 8.0  # seconds that Tune has for its step
LOOK = 1.0  # seconds between two looks at Ray
STUCK = 12.0  # seconds after which the main thread is taken to wait for a Ray that is gone
INSIST = 3.0  # seconds between two calls to the main thread: the first may be lost in a callback


class InterruptedStudyError(Exception):
    """A study was ended by a signal, in good order.

    Args:
        number: of the signal.
        study: its name.
        begun: whether its folder is there, so that it can be resumed.

    Attributes:
        signal: its number; a command ends with the code 128 + signal.
    """

    def __init__(
        self, number: int, study: str, *, begun: bool = True, again: Sequence[str] = ()
    ) -> None:
        how = _how(study, begun, again)
        super().__init__(f"{study} was ended by {signal.Signals(number).name}; {how}.")
        self.signal = number


class LostRayError(StudyError):
    """Ray has died under a study; a command ends with the code 1, as for anything that broke."""

    def __init__(
        self, reason: str, study: str, *, begun: bool = True, again: Sequence[str] = ()
    ) -> None:
        how = _how(study, begun, again)
        super().__init__(f"Ray died while {study} ran ({reason}); {how}.")


def _how(study: str, begun: bool, again: Sequence[str]) -> str:
    """What to do next; `again` are the words of the command that goes on."""
    words = " ".join(again) or f"--resume {study}"
    return f"go on with {words}" if begun else "launch it again, what is trained is kept"


@contextmanager
def ends_of_a_command(hint: str = "") -> Iterator[None]:
    """What ends the work within ends the command: it is told on standard error, and the code is 128 +
    the signal, 1 where Ray died, and 2 for all that is refused.

    Args:
        hint: said behind what the environment refuses, such as a full disk.
    """
    try:
        yield
    except InterruptedStudyError as error:
        Console(stderr=True).tell(str(error))
        sys.exit(128 + error.signal)
    except BimaskError as error:
        Console(stderr=True).tell_error(error)
        sys.exit(1 if isinstance(error, LostRayError) else 2)
    except OSError as error:
        Console(stderr=True).tell_error(f"{error}{hint}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class Interrupts:
    """Which signal has come, if any, or why Ray is gone.

    What ends a study raises KeyboardInterrupt in the main thread, as Ctrl-C does everywhere in Python,
    but for what `ask_first` and `hold` say.

    Attributes:
        signal: the first that came.
        lost: why Ray is gone.
        again: a second signal came: the study ends at once, without its summary.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.lost: str | None = None
        self.again = False
        self._at = 0.0
        self._ask: Callable[[], bool] | None = None
        self._held = False
        self._taken = False  # what uses Ray has ended

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be begun."""
        return self.signal is not None or self.lost is not None

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            if time.monotonic() - self._at < SAME:
                return
            self.again = True
            raise KeyboardInterrupt
        self.signal, self._at = number, time.monotonic()
        if not self._held and not (self._ask is not None and self._ask()):
            raise KeyboardInterrupt

    def _woken(self, _number: int, _frame: FrameType | None) -> None:
        if self.ended and not self._held and not self._taken:
            raise KeyboardInterrupt

    def reason(
        self, name: str, *, begun: bool, again: Sequence[str] = ()
    ) -> InterruptedStudyError | LostRayError:
        """What a study that was ended raises; it says how to go on.

        Args:
            begun: whether its folder is there.
            again: the words of the command that goes on; none are `--resume NAME`.
        """
        if self.signal is not None:
            return InterruptedStudyError(self.signal, name, begun=begun, again=again)
        return LostRayError(self.lost or "nobody knows why", name, begun=begun, again=again)

    @contextmanager
    def in_good_order(
        self, reason: Callable[[], InterruptedStudyError | LostRayError]
    ) -> Iterator[None]:
        """Hear signals (`handled`); where one came, or Ray was lost, `reason()` is raised."""
        try:
            with self.handled():
                yield
        except KeyboardInterrupt:
            if not self.ended:
                raise
        except Exception as error:
            if not self.explains(error):
                raise
        if self.ended:
            raise reason()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Hear the signals that are not ignored (`nohup` ignores SIGHUP); in the main thread alone."""
        if threading.current_thread() is not threading.main_thread():  # signals are not ours to take
            yield
            return
        before = {number: signal.getsignal(number) for number in (*SIGNALS, WAKE, signal.SIGUSR1)}
        self._hear()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._heard)
        signal.signal(WAKE, self._woken)

    @contextmanager
    def defer(self) -> Iterator[None]:
        """While Ray starts: signals wait until it has, and are then ours again.

        `ray.init` takes SIGTERM for itself, below Python, and would end this process as by a crash.
        """
        if not callable(signal.getsignal(WAKE)):
            yield
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._held = True  # another thread, of a library's, may take what this one blocks
        try:
            yield
        finally:
            self._held = False
            self._hear()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if self.ended:
                raise KeyboardInterrupt

    @contextmanager
    def ask_first(self) -> Iterator[None]:
        """While Tune runs: the first signal lets it end its step, for which it has `PATIENCE`.

        What ends it in good order raises nothing here; `ended` says so.
        """
        over = threading.Event()
        patience = threading.Thread(target=_insist, args=(over, PATIENCE), daemon=True)

        def ask() -> bool:
            if not callable(signal.getsignal(signal.SIGUSR1)):  # Tune has not begun, or is over
                return False
            patience.start()
            os.kill(os.getpid(), signal.SIGUSR1)  # it calls no callback for what still runs
            return True

        self._ask = ask
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGUSR1)
        try:
            yield
        except KeyboardInterrupt:
            if self.again or not self.ended:
                raise
        except Exception as error:
            if not self.explains(error):
                raise
        finally:
            self._ask, self._taken = None, self.ended
            over.set()
            if main:  # Tune leaves its handler behind, which asks a Tune that is over
                signal.signal(signal.SIGUSR1, before)

    def explains(self, error: Exception) -> bool:
        """Whether an error is only what follows from a Ray that is gone."""
        deadline = time.monotonic() + 5 * LOOK
        while from_ray(error) and self.lost is None and time.monotonic() < deadline:
            time.sleep(0.1)  # it may come before we look
        return self.lost is not None

    @contextmanager
    def hold(self) -> Iterator[None]:
        """While what has been found is written down: the first signal is kept for later."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    @contextmanager
    def watch(self, gone: Callable[[], str | None], at_worst: Callable[[], object]) -> Iterator[None]:
        """Look again and again whether Ray is gone; where it is, the main thread hears of it.

        Args:
            gone: why it is, or None.
            at_worst: called by another thread where the main one does not hear: a call of Ray's own
                that waits for its GCS can be interrupted by nothing, and ends the process in a minute
                without a word. It ends the process with one.
        """
        over = threading.Event()

        def look() -> None:
            while not over.wait(LOOK):
                if (why := gone()) is not None:
                    self.lost = why
                    _insist(over, 0, lambda: self._held or self._taken, at_worst)

        thread = threading.Thread(target=look, name="watch Ray", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def leave(reason: InterruptedStudyError | LostRayError, shown: str = "") -> None:
    """End this process from any of its threads, as a command does that was ended so.

    Args:
        shown: before the reason: what there is.
    """
    own_ray.set_last_words("")
    print(f"{shown}{reason}", file=sys.stderr, flush=True)
    os._exit(128 + reason.signal if isinstance(reason, InterruptedStudyError) else 1)


def _insist(
    over: threading.Event,
    seconds: float,
    heard: Callable[[], bool] = lambda: False,
    at_worst: Callable[[], object] = lambda: None,
) -> None:
    """After so many seconds have the main thread look at what has come, until it is over.

    A signal of the system's own, so that it is heard in a call of the system, too.
    """
    began = time.monotonic()
    while not over.wait(seconds):
        if callable(signal.getsignal(WAKE)):
            signal.pthread_kill(threading.main_thread().ident or 0, WAKE)
            if time.monotonic() - began > STUCK and not heard():
                at_worst()
        seconds = INSIST
