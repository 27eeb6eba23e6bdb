"""A folder that appears whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bimask.errors import SettingError


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
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
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Nothing is ever written over.

    Raises:
        SettingError: `out` exists.
    """
    if out.exists():
        raise SettingError(f"{out} exists; give a new one with --out.")
