"""Where a SQLite file is, as the URL that SQLAlchemy, Optuna and MLflow take, and back."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError


def sqlite_url(path: Path) -> str:
    """Of an absolute path: `?`, `#` and `%` in it are the path's, and no part of the URL's grammar."""
    return URL.create("sqlite", database=str(path.resolve())).render_as_string()


def sqlite_path(url: str) -> Path | None:
    """The file that a URL names; None where it names no SQLite file."""
    try:
        parts = make_url(url)
    except (ArgumentError, ValueError):
        return None
    if parts.get_backend_name() != "sqlite" or parts.database in (None, "", ":memory:"):
        return None
    return Path(str(parts.database))
