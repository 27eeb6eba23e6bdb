"""Progress that is told in a log file, too."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console as AnyConsole
from rich.console import ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.segment import Segment
from rich.text import Text

from bimask.errors import MOST_CHARACTERS, BimaskError, printable

EVERY = 30.0  # seconds between two lines where there is no terminal
MOST_IN_A_BAR = 200  # characters
NAME = "progress lines"  # of the thread that writes them


class Console(AnyConsole):
    """A terminal, or a file, that no text can steer: the one place where words reach it.

    A string is what it is, on one line and bounded: no markup, no emoji, no control character, nothing
    made bold because it looks like a number. Style is a program's own, given beside the words.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"markup": False, "emoji": False, "highlight": False} | options))

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string passes here: printed, in a table, or as its title."""
        return super().render_str(printable(text, MOST_CHARACTERS), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The same, with `?` for what is neither a character nor the end of a line."""
        for text, style, control in super().render(renderable, options):
            if control is None and not text.isprintable():
                text = "\n".join(map(printable, text.split("\n")))
            yield Segment(text, style, control)

    def tell(self, sentence: str, *, mark: str = "", style: str = "") -> None:
        """A sentence on a line of its own, however long it is.

        Args:
            mark: a word before it, such as "warning".
            style: of the mark; where there is none, of the sentence.
        """
        words = Text(printable(sentence, MOST_CHARACTERS), "" if mark else style)
        if mark:
            words = Text.assemble((printable(mark), style), ": ", words)
        self.print(words, soft_wrap=True)

    def tell_error(self, error: BaseException | str) -> None:
        """Why a command ends: every line of an error."""
        first, *others = error.lines if isinstance(error, BimaskError) else [str(error)]
        self.tell(first, mark="error", style="bold red")
        for line in others:
            self.tell(line)


class _Description(TextColumn):
    """What a bar is about, on one line."""

    def render(self, task: Task) -> Text:
        return Text(printable(task.description, MOST_IN_A_BAR))


class ToldProgress(Progress):
    """Bars on a terminal. Elsewhere, where bars are drawn at the end alone, every unfinished task is a
    line every `EVERY` seconds as well.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        columns = (_Description(""), BarColumn(), MofNCompleteColumn())
        super().__init__(*columns, TimeElapsedColumn(), console=console)
        self._over = threading.Event()
        self._teller: threading.Thread | None = None

    def start(self) -> None:
        """Draw, or begin to tell."""
        super().start()
        if not self.console.is_terminal and self._teller is None:
            self._teller = threading.Thread(target=self._tell, name=NAME, daemon=True)
            self._teller.start()

    def stop(self) -> None:
        """Draw the last state, and tell no more."""
        self._over.set()
        if self._teller is not None:
            self._teller.join()
        super().stop()

    def _tell(self) -> None:
        while not self._over.wait(EVERY):
            for task in self.tasks:
                if task.visible and not task.finished:
                    total = "?" if task.total is None else f"{task.total:.0f}"
                    took = timedelta(seconds=int(task.elapsed or 0))
                    about = printable(task.description, MOST_IN_A_BAR)
                    said = f"{about}  {task.completed:.0f}/{total}  {took}"
                    self.console.print(said, soft_wrap=True)


class _Lasting:
    """A text stream whose reader may leave: what is written after that goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if anybody reads."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, if anybody reads."""
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except BlockingIOError:  # it reads, but slowly
            pass
        except OSError:  # the pipe (`| head`) or the terminal is closed, or the log's disk is full
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """From here on a closed standard output or error is no failure of this process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Lasting):
            setattr(sys, name, _Lasting(stream))
