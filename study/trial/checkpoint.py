"""Where the trials of a group stand, kept while they run: what a study cut short goes on from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import SafetensorError

from bimask.defences.settings import DefenceConfig
from bimask.defences.state import DefenceState
from bimask.errors import SettingError
from bimask.files.bounded import read_json
from study.store.files import write_text

# Of one member: rung -> its losses there, and why it was stopped, or None.
Rungs = tuple[dict[str, list[float]], str | None]
RUNGS = TypeAdapter(list[Rungs])


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
        self.kept_at = time.monotonic()
        self.last: Callable[[], DefenceState] | None = None

    def state(self, configs: Sequence[DefenceConfig]) -> DefenceState | None:
        """What was kept of a run with these configurations; None where nothing was, or of others."""
        if not self.path.is_file() or self._rungs() is None:
            return None
        try:
            state = DefenceState.load(self.path)
        except SettingError:
            return None
        wanted = [config.model_dump(mode="json") for config in configs]
        if [member.get("config") for member in state.members] != wanted:
            return None  # of a group with other members: these begin at the beginning
        self.seconds = state.seconds
        return state

    def between_steps(self, take: Callable[[], DefenceState]) -> None:
        """Keep the state if the last one is `every` seconds old."""
        self.last = take
        if time.monotonic() - self.kept_at >= self.every:
            self.keep()

    def keep(self) -> None:
        """Keep the state as it is now, if there was ever one."""
        if self.last is None:
            return
        with suppress(OSError, SafetensorError):  # a full disk costs the checkpoint, not the trial
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.last().save(self.path)
            self.on_kept(self.path)
        self.kept_at = time.monotonic()

    def keep_rungs(self, said: list[Rungs]) -> None:
        """Keep what the members' rungs said: a state holds their masks, not why one ended."""
        path = self.path.with_suffix(".rungs.json")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(said))
            self.on_kept(path)

    def rungs(self) -> list[Rungs]:
        """What was kept, a member each; empty if nothing was, or no state to go on from."""
        return (self._rungs() or []) if self.path.is_file() else []

    def _rungs(self) -> list[Rungs] | None:
        """What the file says; None where it is damaged, and then the state beside it is worth nothing:
        nobody knows any longer which member was stopped, and why."""
        path = self.path.with_suffix(".rungs.json")
        if not path.is_file():
            return []
        try:
            return RUNGS.validate_python(read_json(path))
        except (OSError, ValueError):
            return None
