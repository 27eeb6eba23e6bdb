"""Where a Ray of our own lies, and which of such folders the next start removes."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from study.search.embedded import folders
from study.spec.config import StudyError

ROOT = Path(__file__).parents[4]
HOLDS = """
import subprocess, sys
from pathlib import Path
from study.search.embedded.folders import HeldFolder
held = HeldFolder(Path(sys.argv[1]))
(held.path / "r").mkdir()
child = subprocess.Popen(["sleep", "600"], pass_fds=[held.descriptor])
print(held.path, child.pid, flush=True)
child.wait()
"""


FULL = """
import os, subprocess, sys
from pathlib import Path
from study.search import start_ray
for name in ("/tmp", "/var/tmp", "/dev/shm"):
    below = os.open(name, os.O_PATH)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", name], check=True)
    for needed in {Path(sys.argv[1]), Path(sys.prefix)}:  # what lies there is imported later
        if needed.is_relative_to(name):
            there = f"/proc/{os.getpid()}/fd/{below}/{needed.relative_to(name)}"
            needed.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--no-canonicalize", "--bind", there, needed], check=True)
start_ray("local")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The one folder for temporary files."""
    monkeypatch.setattr(folders, "_places", lambda: iter([tmp_path]))
    return tmp_path


@pytest.fixture
def driver(place):
    """Another process with a folder and a child that holds it, too: process, folder, child's pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(place)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    path, child = process.stdout.readline().split()
    yield process, Path(path), int(child)
    process.kill()
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(child), signal.SIGKILL)


def test_the_folder_of_rays_sockets_is_short_where_the_usual_one_is_long(tmp_path, monkeypatch):
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert folders.short_folder() == Path("/tmp")
    short = Path("/dev/shm")
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    assert folders.short_folder() == short
    monkeypatch.setattr(folders, "LONGEST", 5)
    with pytest.raises(StudyError, match="set RAY_TMPDIR"):
        folders.short_folder()


def test_disks_that_are_full_are_told_before_ray_waits_for_them():
    """Ray does not say so: it gives up after minutes, and its logs are lost."""
    within = ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*within, "true"]).returncode:
        pytest.skip("no disk of our own may be mounted here")
    kept = {name: value for name, value in os.environ.items() if not name.endswith("TMPDIR")}
    done = subprocess.run(
        [*within, sys.executable, "-c", FULL, str(ROOT)],
        capture_output=True,
        text=True,
        env=kept | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    sentence = done.stderr.splitlines()[-1]  # above it are the frames, and their source if it is there
    assert "StudyError: " in sentence
    assert "/tmp has 0.0 MiB free" in sentence, done.stderr
    assert sentence.endswith("set RAY_TMPDIR to one.")


def test_a_folder_is_swept_when_driver_and_children_are_dead_and_not_before(driver):
    process, path, child = driver
    folders.sweep()
    assert (path / "r").is_dir(), "its driver lives"
    process.kill()
    process.wait()
    folders.sweep()
    assert (path / "r").is_dir(), "a process of its Ray lives"
    os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while path.exists():
        assert time.monotonic() < deadline
        folders.sweep()
        time.sleep(0.02)


def test_what_is_not_surely_ours_and_dead_stays(place, monkeypatch):
    new = place / "bimask-12345678"  # one that is being made has no lock yet
    new.mkdir()
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").touch()
    (place / "bimask-87654321").symlink_to(elsewhere)
    (place / "other").mkdir()
    (place / "other" / "lock").touch()
    (place / "bimask-file").touch()
    before = set(place.rglob("*"))
    folders.sweep()
    assert set(place.rglob("*")) == before
    strangers = place / "bimask-strangers"
    strangers.mkdir()
    (strangers / "lock").touch()
    monkeypatch.setattr(os, "getuid", lambda: strangers.stat().st_uid + 1)
    folders.sweep()
    assert strangers.exists()
    monkeypatch.undo()


def test_a_removed_folder_is_gone_and_another_one_is_held(place):
    first, second = folders.HeldFolder(place), folders.HeldFolder(place)
    first.remove()
    folders.sweep()
    assert [path.name for path in place.iterdir()] == [second.path.name]
    second.remove()
