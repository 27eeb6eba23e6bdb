"""A power cut at every moment at which a disk was told to keep something: records keep their promise.

The disk of these tests has a file's content when that was synced, and a folder's names when the folder
was. What was not synced is lost in two ways: a strict disk has lost the names as well, another has the
names and empty files, which is what ext4 leaves of a file that was renamed too early.
"""

import json
import os
import stat
from pathlib import Path

import pytest

from bimask.files.atomic import atomic_directory, atomic_write
from study.spec.config import StudyConfig
from study.store.files import append_lines, write_text
from study.store.session import Identity, begin
from study.tracking.recorder import Recorder

CONFIG = StudyConfig.model_validate(
    {
        "name": "cut",
        "trials": 3,
        "victims": [
            {"dataset": "digits", "net": "small_resnet", "width": 4, "attack": {"name": "badnets"}}
        ],
        "reference_point": {"clean_accuracy": 0.1, "attack_success": 1.0},
        "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True}},
    }
)
SCORES = {"clean_accuracy": 0.9, "attack_success": 0.1, "recovery": 0.8}
REPORT = {
    **SCORES,
    "scores": {"v": SCORES},
    "seconds": 1.0,
    "rounds": 2,
    "passes": {"forward": 1, "backward": 0},
    "device": "cpu",
}
MASKS = b"masks of trial %d"


class Disk:
    """What has been synced below a folder, which was on the disk from the first.

    Attributes:
        on_sync: called after each.
    """

    def __init__(self, root, monkeypatch):
        self.root, self.files, self.folders, self.held = root, {}, {}, []
        self.on_sync, self.syncs = lambda: None, 0
        self.folders[root.stat().st_ino] = {}
        fsync = os.fsync

        def synced(number):
            fsync(number)
            found, place = os.fstat(number), f"/proc/self/fd/{number}"
            self.held.append(os.dup(number))  # as long as it is open, no other file gets its number
            if stat.S_ISDIR(found.st_mode):
                self.folders[found.st_ino] = self.names(place)
            else:
                self.files[found.st_ino] = Path(place).read_bytes()
            self.syncs += 1
            self.on_sync()

        monkeypatch.setattr(os, "fsync", synced)

    @staticmethod
    def names(place):
        with os.scandir(place) as entries:
            return {one.name: (one.inode(), one.is_dir()) for one in entries}

    def after_cut(self, *, strict):
        """Relative path -> content of what the disk has after a power cut now."""
        found, names = {}, None if strict else {i: n for i, n in self._now()}
        queue = [(self.root.stat().st_ino, "")]
        while queue:
            folder, prefix = queue.pop()
            for name, (inode, is_folder) in (names or self.folders).get(folder, {}).items():
                if is_folder:
                    queue.append((inode, f"{prefix}{name}/"))
                else:
                    found[prefix + name] = self.files.get(inode, b"")
        return found

    def _now(self):
        for folder, _, _ in os.walk(self.root):
            yield os.stat(folder).st_ino, self.names(folder)

    def close(self):
        for number in self.held:
            os.close(number)


@pytest.fixture
def disk(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch)
    yield disk
    disk.close()


class Nobody:
    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def recorded(found):
    lines = found.get("trials.jsonl", b"").splitlines()
    return [json.loads(line)["number"] for line in lines]


def require_whole(found):
    """Every record's files are there, with what was in them."""
    for number in recorded(found):
        folder = f"trials/{number:03d}/"
        assert found.get(f"{folder}v.masks.safetensors") == MASKS % number
        assert b"mask_lr" in found.get(f"{folder}purify.yaml", b"")


def test_a_record_is_never_on_the_disk_without_its_files(tmp_path_factory, disk, tmp_path):
    made = tmp_path_factory.mktemp("made")

    def at_every_sync():
        for strict in (True, False):
            require_whole(disk.after_cut(strict=strict))

    disk.on_sync = at_every_sync
    recorder = Recorder(CONFIG, tmp_path, Nobody(), {}, lambda _: None)
    for number in range(3):
        (made / "v.masks.safetensors").write_bytes(MASKS % number)
        recorder.started(number, None, {"mask_lr": 0.1})
        recorder.completed(number, REPORT, made)
        recorder.write()
        for strict in (True, False):
            assert recorded(disk.after_cut(strict=strict)) == list(range(number + 1))
    assert disk.syncs > 10, "so many cuts"


def test_a_study_that_has_begun_is_on_the_disk(disk, tmp_path):
    begin(tmp_path / "cut", CONFIG, Identity("id", CONFIG.digest, {"v": "digest"}))
    for strict in (True, False):
        found = disk.after_cut(strict=strict)
        assert json.loads(found["cut/identity.json"])["study_id"] == "id"
        assert found["cut/study.yaml"] == (tmp_path / "cut" / "study.yaml").read_bytes()


def test_what_appears_whole_stays_whole(disk, tmp_path):
    with atomic_directory(tmp_path / "victim") as part:
        (part / "deep").mkdir()
        (part / "deep" / "weights").write_bytes(b"weights")
    with atomic_write(tmp_path / "state") as part:
        part.write_bytes(b"state")
    write_text(tmp_path / "summary.json", "{}")
    append_lines(tmp_path / "confirm.jsonl", [{"number": 1}])
    for strict in (True, False):
        found = disk.after_cut(strict=strict)
        assert found["victim/deep/weights"] == b"weights"
        assert found["state"] == b"state"
        assert found["summary.json"] == b"{}"
        assert found["confirm.jsonl"].startswith(b'{"number": 1')
