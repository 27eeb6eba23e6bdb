"""Files that a kill in the middle of a write leaves whole: the old content or the new, no line lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from bimask.files.atomic import atomic_write
from study.spec.config import StudyError


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    with atomic_write(path) as part, part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def append_lines(path: Path, rows: Sequence[Mapping[str, object]], *, durable: bool = True) -> None:
    """Add one line of JSON a row, all or none where the disk is full.

    Args:
        durable: wait until the disk has them.
    """
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(text) != len(text):
                raise OSError(f"{path} took only a part of what was written")
            if durable:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def read_lines(path: Path, *, mend: bool = False) -> list[dict[str, object]]:
    """The rows of `append_lines`; none where there is no file. A last line without its end is dropped.

    Args:
        mend: cut such a line off the file as well, so that the next one begins where it should.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if mend and len(whole) < len(content):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder, whole or not at all; one that is there already is replaced."""
    part = target.with_name(f".{target.name}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(source, part)
        if target.exists():
            shutil.rmtree(target)
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Hold a study's folder, as long as this process lives: two drivers would undo each other's work.

    The folder need not be there. What is yielded is the lock's file.

    Raises:
        StudyError: another process holds it.
    """
    path = folder.with_name(f".{folder.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise StudyError(
            f"Another process is at work on {folder}; wait for its end, or end it, then resume."
        ) from error
    try:
        yield path
    finally:
        lock.release()
