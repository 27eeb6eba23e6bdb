"""The folder that a Ray of our own lies in: short, held while that Ray lives, then swept away."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from study.spec.config import StudyError

# Ray's sockets are FOLDER/session_DATE_PID/sockets/plasma_store, and a socket's path has 107 characters
# on Linux, 103 elsewhere, of which Ray's part takes 64.
LONGEST = (107 if sys.platform.startswith("linux") else 103) - 64
PREFIX, RAY = "bimask-", "r"  # our folder, and Ray's in it
OURS = len(f"/{PREFIX}12345678/{RAY}")
LOCK = "lock"
NEEDED = 5 << 20  # bytes, for Ray's logs


class HeldFolder:
    """A new folder of this user's alone in `place`; no `sweep` takes it while this process lives, or
    one that was started with `descriptor`.

    A lock and not the number of a process says so: it ends with its holders, however they end, numbers
    are used again, and a process of another container has none here.

    Attributes:
        path: of the folder.
        descriptor: of the lock, for those processes that are to hold it as well.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """

    def __init__(self, place: Path) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        part = self.path / f".{LOCK}"
        self.descriptor = os.open(part, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        part.rename(self.path / LOCK)  # it is never seen unlocked while we live

    def remove(self) -> None:
        """Remove the folder, and hold it no longer."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.descriptor)


def sweep() -> None:
    """Remove the folders of this user's that nobody holds any longer.

    A watchdog removes its own; what is left is of one that was killed.
    """
    for place in dict.fromkeys(_places()):
        for path in place.glob(f"{PREFIX}*"):
            _remove_if_left(path)


def _remove_if_left(path: Path) -> None:
    try:
        if path.lstat().st_uid != os.getuid() or path.is_symlink():
            return  # whoever may write there may make such a folder
        lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except OSError:  # it is held
        return
    finally:
        os.close(lock)


def short_folder() -> Path:
    """A folder for temporary files in which the paths of Ray's sockets are short enough, on a disk that
    has room for its logs.

    RAY_TMPDIR and the usual one come first, others where these cannot be used.

    Raises:
        StudyError: there is none; it says why.
    """
    faults = []
    for folder in dict.fromkeys(_places()):
        if (fault := _fault(folder)) is None:
            return folder
        faults.append(f"{folder} {fault}")
    raise StudyError(
        f"Got no folder for Ray's sockets and logs ({'; '.join(faults)}), expected one of at most "
        f"{LONGEST - OURS} characters with {NEEDED >> 20} MiB free; set RAY_TMPDIR to one."
    )


def _fault(folder: Path) -> str | None:
    """Why Ray cannot lie in a folder, or None."""
    if len(str(folder)) > LONGEST - OURS:
        return "has too long a name"
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return "cannot be written to"
    if (free := shutil.disk_usage(folder).free) < NEEDED:  # Ray would wait for minutes, without a word
        return f"has {free / 2**20:.1f} MiB free"
    return None


def _places() -> Iterator[Path]:
    """Where folders for temporary files may be, the best first."""
    names = [os.environ.get("RAY_TMPDIR")]
    with contextlib.suppress(FileNotFoundError):  # where none can be written to
        names.append(tempfile.gettempdir())
    for name in (*names, "/tmp", "/var/tmp", "/dev/shm"):
        if name:
            yield Path(name).absolute()
