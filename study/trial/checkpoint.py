"""Where the trials of a group stand, kept while they run: what a study cut short goes on from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from bimask.defences.ims.checkpoint import PopulationState
from bimask.defences.ims.population import PopulationPurifier
from bimask.defences.ims.result import PurifyResult
from bimask.errors import NonFiniteError, SettingError
from study.store.files import write_text

# Of one member: rung -> its losses there, and why it was stopped, or None.
Rungs = tuple[dict[str, list[float]], str | None]


class Checkpoints:
    """The populations that one group of trials runs, a file each.

    Args:
        folder: of this group alone; made when there is something to keep.
        every: seconds between two states, which is the most that a kill costs.
        on_kept: called with every file that is written there; an OSError of it costs nothing else.
    """

    def __init__(
        self, folder: Path, every: float, on_kept: Callable[[Path], object] = lambda _: None
    ) -> None:
        self.folder, self.every, self.on_kept = folder, every, on_kept

    def place(self, key: str) -> TrialCheckpoint:
        """The place of one population; `key` names it in the group."""
        return TrialCheckpoint(self.folder / f"{key}.safetensors", self.every, self.on_kept)


class TrialCheckpoint:
    """Where one population is kept.

    Attributes:
        seconds: wall time that went into the state that was gone on from.
    """

    def __init__(self, path: Path, every: float, on_kept: Callable[[Path], object]) -> None:
        self.path, self.every, self.on_kept = path, every, on_kept
        self.seconds = 0.0

    def run(self, population: PopulationPurifier) -> list[PurifyResult | NonFiniteError]:
        """Run a population to its end, from where it stood if that was kept."""
        path = self.path
        if path.is_file():
            self._resume(population, path)
        kept = time.monotonic()

        def between_rounds() -> None:
            nonlocal kept
            if time.monotonic() - kept >= self.every:
                self._keep(population, path)
                kept = time.monotonic()

        results = population.run(between_rounds=between_rounds)
        self._keep(population, path)
        return results

    def _resume(self, population: PopulationPurifier, path: Path) -> None:
        try:
            state = PopulationState.load(path)
            state.put_into(population)
        except SettingError:
            return  # of a group with other members: these begin at the beginning
        self.seconds = state.seconds

    def _keep(self, population: PopulationPurifier, path: Path) -> None:
        with suppress(OSError, SafetensorError):  # a full disk costs the checkpoint, not the trial
            path.parent.mkdir(parents=True, exist_ok=True)
            PopulationState.of(population).save(path)
            self.on_kept(path)

    def keep_rungs(self, said: list[Rungs]) -> None:
        """Keep what the members' rungs said: a state holds their masks, not why one ended."""
        path = self.path.with_suffix(".rungs.json")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(said))
            self.on_kept(path)

    def rungs(self) -> list[Rungs]:
        """What was kept, a member each; empty if nothing was, or no state to go on from."""
        path = self.path.with_suffix(".rungs.json")
        if not path.is_file() or not self.path.is_file():
            return []
        return [(rungs, stopped) for rungs, stopped in json.loads(path.read_text())]
