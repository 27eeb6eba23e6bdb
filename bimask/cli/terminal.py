"""What the commands share of a terminal: a progress bar, a table of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.table import Table

from bimask.metrics import Scores
from bimask.progress import Console, ToldProgress

console = Console()


@contextmanager
def progress_bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of `total` steps; the context's value moves it on by a number of steps."""
    with ToldProgress(console) as progress:
        task = progress.add_task(text, total=total)
        yield lambda steps: progress.update(task, advance=steps)


def score_table(rows: dict[str, Scores]) -> None:
    """Scores as a table, one row a name."""
    table = Table("", "ACC %", "ASR %", "RA %", "n clean", "n triggered", "split")
    for name, scores in rows.items():
        values = (scores.clean_accuracy, scores.attack_success, scores.recovery)
        numbers = [f"{100 * value:.1f}" for value in values]
        table.add_row(name, *numbers, str(scores.n_clean), str(scores.n_triggered), scores.split)
    console.print(table)
