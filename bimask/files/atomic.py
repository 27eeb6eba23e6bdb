"""Files and folders that appear whole or not at all, also where the power fails right after; a manifest
that a stranger may have made.

A rename alone is not enough: the disk may know the new name before it has what is in the file. So what
is written here is synced, then renamed, and then the folder that holds the name is synced.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bimask.errors import SettingError
from bimask.files.bounded import parsed_json, read_bytes

MAX_MANIFEST_BYTES = 16 * 2**20


def parsed_manifest(path: Path) -> tuple[Any, bytes]:
    """What a manifest's JSON says, and its bytes.

    Raises:
        OSError: it cannot be read; also if it is no regular file, which could be without end.
        ValueError: too large, no JSON, or beyond a bound of `bimask.files.bounded`.
    """
    content = read_bytes(path, MAX_MANIFEST_BYTES)
    return parsed_json(content), content


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of `path` when the context ends without an exception; a
    kill or a power cut in the middle leaves the old file."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """A folder to write to, which is named `out` when the context ends without an exception.

    Raises:
        SettingError: `out` exists, or nothing can be written beside it.
    """
    refuse_existing(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=out.parent))
    except OSError as error:
        raise SettingError(f"Cannot write to {out.parent}: {error.strerror}.") from error
    try:
        yield part
        part.chmod(0o755)
        sync_tree(part)
        os.rename(part, out)
        sync(out.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names.

    Raises:
        OSError: the disk does not take it; also if there is no such path.
    """
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_tree(folder: Path) -> None:
    """Wait until the disk has a folder with all that is in it; its own name is in its parent."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root) / name)
        sync(Path(root))


def refuse_existing(out: Path) -> None:
    """Nothing is ever written over.

    Raises:
        SettingError: `out` exists.
    """
    if out.exists() or out.is_symlink():
        raise SettingError(f"{out} exists; give a new folder.")
