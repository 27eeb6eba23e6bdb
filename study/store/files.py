"""Files that a kill or a power cut in the middle of a write leaves whole: the old content or the new,
no line lost, and no line that promises files which the disk does not have."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from bimask.files.atomic import atomic_write, sync, sync_tree
from bimask.files.bounded import parsed_json, require_regular
from study.spec.config import StudyError

MAX_FILE, MAX_LINE = 2 * 2**30, 16 * 2**20  # bytes; a million trials, one trial on a thousand victims
MAX_VALUES = 500_000  # in a line
BEGINNING = 2**12  # bytes that are looked at of a line that is too long
CHECKSUM = "checksum"  # of a line, its last key; lines of before there was one have none


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    with atomic_write(path) as part:
        part.write_text(text)


def begun_folder(outputs: Path, what: str, name: str, file: str) -> Path:
    """The folder of a study, a comparison or a protocol that was begun: it has that file.

    Args:
        what: which of these, for people.

    Raises:
        StudyError: there is none of this name; it says which there are.
    """
    folder = outputs / name
    if not (folder / file).is_file():
        known = sorted(path.parent.name for path in outputs.glob(f"*/{file}"))
        raise StudyError(
            f"There is no {what} {name!r} in {outputs} to go on with; there are: "
            f"{', '.join(known) or 'none'}."
        )
    return folder


def append_lines(path: Path, rows: Sequence[Mapping[str, object]], *, durable: bool = True) -> None:
    """Add one line of JSON a row, each with its checksum; all or none where the disk is full.

    Args:
        durable: wait until the disk has them, and the name of the file.
    """
    text = "".join(json.dumps({**row, CHECKSUM: _checksum(row)}) + "\n" for row in rows).encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(text) != len(text):
                raise OSError(f"{path} took only a part of what was written")
            if durable:
                os.fsync(file.fileno())
                sync(path.parent)
        except OSError:
            file.truncate(size)
            raise


def _checksum(row: Mapping[str, object]) -> str:
    """CRC-32 of a row as JSON, eight hex digits: against what a disk does, not against people."""
    return f"{zlib.crc32(json.dumps(dict(row)).encode()):08x}"


@dataclass(frozen=True)
class Line:
    """A line of a file of records.

    Attributes:
        number: from 1.
        start, size: bytes of the file before it, and its own with its end.
        content: its bytes, without the rest of a line that is too long to be read.
        whole: whether it has an end; the last one may be being written.
        row: what it says; empty where it cannot be read.
        fault: why it cannot be read, or None.
    """

    number: int
    start: int
    size: int
    content: bytes
    whole: bool
    row: dict[str, object]
    fault: str | None = None


def lines_of(path: Path) -> Iterator[Line]:
    """All lines of `append_lines`, one at a time, also those that cannot be read, and a last one
    without its end; none where there is no file.

    Raises:
        StudyError: it is no regular file, or too large to be one of records.
        OSError: it cannot be read now.
    """
    try:
        require_regular(path, MAX_FILE)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise StudyError(f"{path} is no file of records ({error}); put back what was there.") from error
    with path.open("rb") as file:
        number, start = 0, 0
        while content := file.readline(MAX_LINE + 1):
            number, size, whole = number + 1, len(content), content.endswith(b"\n")
            row: dict[str, object] = {}
            fault = None
            if size > MAX_LINE:
                content = content[:BEGINNING]
                while not whole and (more := file.readline(MAX_LINE)):
                    size, whole = size + len(more), more.endswith(b"\n")
                fault = f"it has {size} bytes, but at most {MAX_LINE} are read"
            else:
                try:
                    row = _row(content)
                except ValueError as error:
                    fault = str(error)
            yield Line(number, start, size, content, whole, row, fault)
            start += size


def _row(content: bytes) -> dict[str, object]:
    if not content.endswith(b"\n"):
        raise ValueError("it has no end")
    if b"\0" in content:
        raise ValueError("it has NUL bytes")
    try:
        row = parsed_json(content, most_values=MAX_VALUES)
    except ValueError as error:
        raise ValueError(f"it is no JSON that is read ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"it is {type(row).__name__}, and a record is an object of JSON")
    known = row.pop(CHECKSUM, None)
    if known is not None and known != _checksum(row):
        raise ValueError("its checksum is of another content")
    return row


def rows_of(path: Path) -> Iterator[dict[str, object]]:
    """The rows of `append_lines`, one at a time; see `read_lines`."""
    for line in lines_of(path):
        if not line.whole:
            return
        if line.fault is not None:
            raise StudyError(
                f"{path}:{line.number} cannot be read: {line.fault}; --resume runs again what is lost."
            )
        yield line.row


def read_lines(path: Path) -> list[dict[str, object]]:
    """The rows of `append_lines`; none where there is no file. A last line without its end is dropped:
    it is being written, or never was.

    Raises:
        StudyError: a line cannot be read, or it is no file of records.
    """
    return list(rows_of(path))


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A folder to write to, which is named `target` when the context ends without an exception, and is
    then on the disk with all that is in it; one that is there already is replaced."""
    if not target.parent.is_dir():
        target.parent.mkdir()
        sync(target.parent.parent)
    part = target.with_name(f".{target.name}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        yield part
        sync_tree(part)
        if target.exists():
            shutil.rmtree(target)
        os.replace(part, target)
        sync(target.parent)
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
