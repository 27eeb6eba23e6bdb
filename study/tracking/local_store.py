"""MLflow's store where it is a SQLite file: made once, held while it is opened, moved with its folder.

MLflow makes the tables of a new file in dozens of steps, and two processes that do so at once, or a
kill in the middle, leave a file that no MLflow opens again. So the tables are made in a file beside
it, under a lock, and take its name when they are whole.

MLflow writes absolute paths into its tables: where artifacts go was decided when the folder was
elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from sqlalchemy import Connection, create_engine, inspect, text
from sqlalchemy.pool import NullPool

from bimask.files.atomic import sync
from study.store.databases import sqlite_path, sqlite_url

LOCK_SECONDS = 120  # that another process may take to make the tables
# What MLflow keeps as an absolute URI of a file, and for models as a version's source.
LOCATIONS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}


@contextmanager
def held(uri: str, make: Callable[[str], object]) -> Iterator[None]:
    """Hold a store while it is opened; one that is no SQLite file is its server's to hold.

    Args:
        make: makes the tables in a new file, whose URI it is given.

    Raises:
        OSError: the folder cannot be written to, or another process holds the store for two minutes.
    """
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _no_stray_folder(uri, path), FileLock(path.with_name(f".{path.name}.lock"), LOCK_SECONDS):
        if not path.exists() or not path.stat().st_size:
            part = path.with_name(f".{path.name}.new")
            for left in path.parent.glob(f"{part.name}*"):
                left.unlink()
            with _no_stray_folder(sqlite_url(part), part):
                make(sqlite_url(part))
            sync(part)
            os.replace(part, path)
            sync(path.parent)
        yield


@contextmanager
def _no_stray_folder(uri: str, path: Path) -> Iterator[None]:
    """MLflow makes the folder that a URI spells, also where `%3F` in it stands for `?`."""
    spelled = Path(uri.removeprefix("sqlite:///")).parent
    stray = [one for one in (spelled, *spelled.parents) if not one.exists()]
    try:
        yield
    finally:
        if spelled != path.parent:
            for one in stray:
                with suppress(OSError):
                    one.rmdir()


def follow_move(uri: str, artifacts: Path) -> str | None:
    """Where a store was moved with the folder of its artifacts, let its tables say where that is now.

    Args:
        artifacts: the folder of its artifacts now, beside the file.

    Returns:
        What was found and done, in a sentence; None where nothing had moved.
    """
    path, place = sqlite_path(uri), artifacts.resolve()
    if path is None or not path.is_file() or path.resolve().parent != place.parent:
        return None
    engine = create_engine(uri, poolclass=NullPool)
    with engine.begin() as connection:
        moved = [old for old in _locations(connection) if _was_here(old, place)]
        stayed = [old for old in moved if _folder(old).is_dir() and not place.is_dir()]
        changed = sum(_renamed(connection, old, place.as_uri()) for old in moved if old not in stayed)
    if stayed:
        return (
            f"MLflow's file was moved to {path}, but its artifacts are still in {_folder(stayed[0])}, "
            f"and go on there; move that folder to {place}."
        )
    if not changed:
        return None
    was = ", ".join(str(_folder(old)) for old in moved)
    return f"The study was moved: MLflow's artifacts were in {was}, are in {place}, and it is told so."


def _locations(connection: Connection) -> list[str]:
    rows = connection.execute(text("SELECT DISTINCT artifact_location FROM experiments"))
    return [row[0] for row in rows if row[0]]


def _folder(location: str) -> Path:
    return Path(unquote(urlsplit(location).path))


def _was_here(location: str, place: Path) -> bool:
    """Whether a location is one that a study gave, elsewhere: others are the user's own choice."""
    same = PurePosixPath(_folder(location)).name == place.name
    return location.startswith("file:") and same and _folder(location) != place


def _renamed(connection: Connection, old: str, new: str) -> int:
    """Replace the beginning of all locations below one; how many rows changed."""
    changed, tables = 0, inspect(connection)
    for table, columns in LOCATIONS.items():
        known = {one["name"] for one in tables.get_columns(table)} if tables.has_table(table) else set()
        for column in known.intersection(columns):
            done = connection.execute(
                text(
                    f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "
                    f"WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'"
                ),
                {"old": old, "new": new},
            )
            changed += done.rowcount
    return changed
