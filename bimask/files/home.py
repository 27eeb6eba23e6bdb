"""A home folder and a user's name where a machine gives none: an account without an entry, HOME=/."""

from __future__ import annotations

import os
import pwd
import stat
import sys
import tempfile
from pathlib import Path


def ensure_home() -> Path:
    """A home that this process may write to, in HOME; and a user's name in USER.

    Ray, MLflow, torch and matplotlib keep files in the home or fail without one, some of them when
    they are imported, so this comes before. Where there is no such home, HOME is from now on a folder
    of this user's own among the temporary files, which is told on standard error.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("USER", f"uid{os.getuid()}")
        os.environ.setdefault("LOGNAME", os.environ["USER"])
    try:
        home = Path.home()
        if home.is_dir() and os.access(home, os.W_OK | os.X_OK):
            return home
        why = f"{home} cannot be written to"
    except RuntimeError:
        why = "there is none"
    home = _own_folder(Path(tempfile.gettempdir()) / f"bimask-home-{os.getuid()}")
    os.environ["HOME"] = str(home)
    print(f"note: this account's home is {home} ({why}); set HOME to another.", file=sys.stderr)
    return home


def _own_folder(wanted: Path) -> Path:
    """That folder if it is ours alone, new or from before; else one that is certainly new."""
    try:
        wanted.mkdir(mode=0o700, exist_ok=True)
        known = wanted.lstat()
        if stat.S_ISDIR(known.st_mode) and known.st_uid == os.getuid() and not known.st_mode & 0o077:
            return wanted
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="bimask-home-"))
