"""Where trials leave their checkpoints: a folder or a bucket (`s3://`, `gs://`) that all nodes see."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from pyarrow import fs

from bimask.files.atomic import atomic_write


def opened(storage: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI or an absolute path, and the path in it.

    Raises:
        OSError, ValueError: pyarrow's, where it is of no known kind.
    """
    if is_bucket(storage):
        system, path = fs.FileSystem.from_uri(storage)
        return system, path
    return fs.LocalFileSystem(), str(Path(storage).absolute())


def exists(storage: str) -> bool:
    """Whether there is a file or a folder."""
    system, path = opened(storage)
    return bool(system.get_file_info(path).type != fs.FileType.NotFound)


def write(storage: str, name: str, text: str) -> None:
    """A small file in it; folders are made."""
    system, path = opened(storage)
    system.create_dir(path, recursive=True)
    with system.open_output_stream(f"{path}/{name}") as stream:
        stream.write(text.encode())


def read(storage: str, name: str) -> str:
    """What `write` has written, maybe elsewhere."""
    system, path = opened(storage)
    with system.open_input_stream(f"{path}/{name}") as stream:
        return str(stream.read().decode())


def put(storage: str, file: Path) -> None:
    """A copy of a file in it, under the file's name, whole or not at all; folders are made."""
    system, path = opened(storage)
    system.create_dir(path, recursive=True)
    if not is_bucket(storage):
        with atomic_write(Path(path) / file.name) as part:
            shutil.copyfile(file, part)
        return
    with file.open("rb") as source, system.open_output_stream(f"{path}/{file.name}") as stream:
        shutil.copyfileobj(source, stream)


def fetch(storage: str, folder: Path) -> None:
    """Copies of the files in it, in a local folder; none where there is no such storage."""
    system, path = opened(storage)
    for found in system.get_file_info(fs.FileSelector(path, allow_not_found=True)):
        if found.type == fs.FileType.File:
            folder.mkdir(parents=True, exist_ok=True)
            local = folder / found.base_name
            with system.open_input_stream(found.path) as source, local.open("wb") as copy:
                shutil.copyfileobj(source, copy)


def remove(storage: str) -> None:
    """The folder with all that is in it, where it exists."""
    if exists(storage):
        system, path = opened(storage)
        system.delete_dir(path)


def is_bucket(storage: str) -> bool:
    """Whether files are sent there, whole, rather than written in place."""
    return "://" in storage


def folder(storage: str) -> Path:
    """Where a process writes what it may lose: the storage, or for a bucket a local folder."""
    if not is_bucket(storage):
        return Path(storage)
    return Path(tempfile.gettempdir()) / storage.partition("://")[2].lstrip("/")


def folders(storage: str, prefix: str) -> list[str]:
    """The folders in it whose names begin so."""
    system, path = opened(storage)
    found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    names = [f.base_name for f in found if f.type == fs.FileType.Directory]
    return [f"{storage}/{name}" for name in sorted(names) if name.startswith(prefix)]


def holds(storage: str, name: str) -> bool:
    """Whether a file of that name is anywhere in it."""
    system, path = opened(storage)
    found = system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    return any(f.base_name == name for f in found)
