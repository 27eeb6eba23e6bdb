"""How far the making of victims is: a bar each, and a line at its end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import TaskID
from rich.text import Text

from bimask.errors import MOST_CHARACTERS, printable
from bimask.progress import Console, ToldProgress
from bimask.victims.files import Victim
from bimask.victims.spec import VictimSpec
from bimask.victims.train import EpochLog, obtain_victim


def in_short(scores: Any) -> str:
    """ACC and ASR of a classifier."""
    return f"ACC {scores.clean_accuracy:.3f}  ASR {scores.attack_success:.3f}"


class VictimBars:
    """A bar for every victim by name: its preparation, then its epochs with scores on val.

    Args:
        told: scores in a line.
    """

    def __init__(self, where: Console, told: Callable[[Any], str] = in_short) -> None:
        self.where, self.progress, self.told = where, ToldProgress(where), told
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
            self.texts[name] = f"  {self.told(log.scores)}"
        self._move(f"{name}{self.texts.get(name, '')}", name, log.epoch, log.epochs)

    def ended(self, name: str, text: str) -> None:
        """The bar makes way for a line."""
        self._over(name)
        self.where.tell(text)

    def failed(self, name: str, reason: str) -> None:
        """The same of a victim that was not made."""
        self._over(name)
        said = Text(printable(f"{name}: failed, {reason}", MOST_CHARACTERS))
        said.stylize("bold red", len(name) + 2, len(name) + 8)
        self.where.print(said, soft_wrap=True)

    def _over(self, name: str) -> None:
        if name in self.tasks:
            self.progress.remove_task(self.tasks.pop(name))

    def _move(self, text: str, name: str, done: int, of: int) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(text)
        self.progress.update(self.tasks[name], description=text, completed=done, total=of)


def described(victim: Victim) -> str:
    """A victim in a line: its digest, and its scores on `test`."""
    scores = victim.scores["test"]
    return (
        f"{victim.spec.digest}: on test ACC {scores.clean_accuracy:.3f}, ASR "
        f"{scores.attack_success:.3f}, RA {scores.recovery:.3f}"
    )


def build(
    name: str,
    spec: VictimSpec,
    out: Path,
    device: torch.device,
    bars: VictimBars,
    *,
    made: bool,
) -> bool:
    """Load a victim, or make it, or say why there is none; whether there is one.

    Args:
        made: whether the line on it says that it was made now.
    """
    try:
        victim = obtain_victim(
            spec,
            out,
            device=device,
            on_epoch=partial(bars.epoch, name),
            on_prepare=partial(bars.preparing, name),
        )
    except Exception as error:  # whatever it is, the others are made
        bars.failed(name, f"{type(error).__name__}: {error}")
        return False
    bars.ended(name, f"{name}: {'made' if made else 'found'}, {described(victim)}")
    return True
