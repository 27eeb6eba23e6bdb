"""A study's name, reserved before anything is made or trained under it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from study.pipeline.prepare import require_writable
from study.spec.comparison import ComparisonConfig
from study.spec.config import StudyConfig, StudyError
from study.spec.protocol import ProtocolConfig
from study.store import records
from study.store.files import locked

Config = TypeVar("Config", StudyConfig, ComparisonConfig, ProtocolConfig)


@contextmanager
def named(
    config: Config, outputs: Path, *, chosen_by_user: bool = False
) -> Iterator[tuple[Config, Path]]:
    """The study, the comparison or the protocol under a name that is free, and its folder, which no
    other process takes meanwhile.

    Nothing is made but `outputs`; the name is reserved by the folder's lock.
    """
    require_writable(outputs)
    reserved: set[str] = set()
    while True:
        name, folder = records.new_folder(
            outputs, config.name, chosen_by_user=chosen_by_user, reserved=reserved
        )
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(locked(folder))
            except StudyError:
                if chosen_by_user:
                    raise
                reserved.add(name)
                continue
            if folder.exists():  # made, and left, since we looked
                continue
            try:
                yield config.model_copy(update={"name": name}), folder
            finally:
                if not folder.exists():
                    with suppress(OSError):
                        lock.unlink()
            return
