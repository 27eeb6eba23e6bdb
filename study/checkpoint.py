"""Where the trials of a group stand, kept while they run: what a study cut short goes on from."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from bimask.checkpoint import PopulationState
from bimask.errors import NonFiniteError, SettingError
from bimask.population import PopulationPurifier
from bimask.result import PurifyResult


class Checkpoints:
    """The populations that one group of trials runs, a file each.

    Args:
        folder: of this group alone; made when there is something to keep.
        every: seconds between two states, which is the most that a kill costs.

    Attributes:
        seconds: wall time that went into the states that were gone on from.
    """

    def __init__(self, folder: Path, every: float) -> None:
        self.folder, self.every = folder, every
        self.seconds = 0.0

    def run(self, population: PopulationPurifier, key: str) -> list[PurifyResult | NonFiniteError]:
        """Run a population to its end, from where it stood if that was kept.

        Args:
            key: names the population in the group.
        """
        path = self.folder / f"{key}.safetensors"
        if path.is_file():
            self._go_on(population, path)
        kept = time.monotonic()

        def between_rounds() -> None:
            nonlocal kept
            if time.monotonic() - kept >= self.every:
                self._keep(population, path)
                kept = time.monotonic()

        results = population.run(between_rounds=between_rounds)
        self._keep(population, path)
        return results

    def _go_on(self, population: PopulationPurifier, path: Path) -> None:
        try:
            state = PopulationState.load(path)
            state.put_into(population)
        except SettingError:
            return  # of a group with other members: these begin at the beginning
        self.seconds += state.seconds

    def _keep(self, population: PopulationPurifier, path: Path) -> None:
        with suppress(OSError, SafetensorError):  # a full disk costs the checkpoint, not the trial
            self.folder.mkdir(parents=True, exist_ok=True)
            PopulationState.of(population).save(path)
