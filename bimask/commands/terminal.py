"""What the commands share of a terminal: options, a progress bar, a table of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import TaskID
from rich.table import Table

from bimask.commands.progress import ToldProgress
from bimask.metrics import Scores
from bimask.victim import EpochLog, Victim

console = Console()

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Run the code of an own net.")]


@contextmanager
def progress_bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of `total` steps; the context's value moves it on by a number of steps."""
    with ToldProgress(console) as progress:
        task = progress.add_task(text, total=total)
        yield lambda steps: progress.update(task, advance=steps)


class VictimBars:
    """A bar for every victim by name: its preparation, then its epochs with ACC and ASR on val."""

    def __init__(self, where: Console = console) -> None:
        self.progress = ToldProgress(where)
        self.tasks: dict[str, TaskID] = {}
        self.texts: dict[str, str] = {}

    def __enter__(self) -> VictimBars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def preparing(self, name: str, what: str, done: int, of: int) -> None:
        """What the attack needs is so far made."""
        self._move(f"{name}  {what}", name, done, of)

    def epoch(self, name: str, log: EpochLog) -> None:
        """An epoch is over; scores stay until there are others."""
        if log.scores is not None:
            scores = log.scores
            self.texts[name] = f"  ACC {scores.clean_accuracy:.3f}  ASR {scores.attack_success:.3f}"
        self._move(f"{name}{self.texts.get(name, '')}", name, log.epoch, log.epochs)

    def ended(self, name: str, text: str) -> None:
        """The bar makes way for a line."""
        if name in self.tasks:
            self.progress.remove_task(self.tasks.pop(name))
        self.progress.console.print(text, soft_wrap=True)

    def _move(self, text: str, name: str, done: int, of: int) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(text)
        self.progress.update(self.tasks[name], description=escape(text), completed=done, total=of)


def described(victim: Victim) -> str:
    """A victim in a line: its digest, and its scores on `test`."""
    scores = victim.scores["test"]
    return (
        f"{victim.spec.digest}: on test ACC {scores.clean_accuracy:.3f}, ASR "
        f"{scores.attack_success:.3f}, RA {scores.recovery:.3f}"
    )


def score_table(rows: dict[str, Scores]) -> None:
    """Scores as a table, one row a name."""
    table = Table("", "ACC %", "ASR %", "RA %", "n clean", "n triggered", "split")
    for name, scores in rows.items():
        values = (scores.clean_accuracy, scores.attack_success, scores.recovery)
        numbers = [f"{100 * value:.1f}" for value in values]
        table.add_row(name, *numbers, str(scores.n_clean), str(scores.n_triggered), scores.split)
    console.print(table)
