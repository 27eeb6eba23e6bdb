"""A study whose disk does not take what it has for a while: nothing fails or is lost, it is said once.

Real processes, Ray, Optuna and SQLite. A file where a folder is to be stands in for a disk that is
full: to a process that may do everything, no folder is read-only.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import study as study_package

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
STUDY = {
    "name": "waits",
    "trials": 3,
    "concurrency": 1,
    "paper_defaults": False,
    "sampler": "random",
    "clean_images_per_class": 3,
    "victims": [
        {
            "dataset": "digits",
            "image_size": 12,
            "net": "small_resnet",
            "width": 4,
            "attack": {"name": "badnets"},
            "epochs": 6,
            "min_clean_accuracy": 0.0,
            "min_attack_success": 0.0,
        }
    ],
    "reference_point": {"clean_accuracy": 0.1, "attack_success": 1.0},
    "choose": {"max_accuracy_drop": 1.0},
    "fixed": {
        "inner_optimizer": "sign",
        "step_size": None,
        "patience": None,
        "initialise_rounds": 2,
        "minimise_rounds": 2,
        "select_rounds": 2,
    },
    "space": {
        "mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True},
        "inner_steps": {"kind": "int", "low": 1, "high": 3},
    },
}


class Launched:
    """`python -m study.launch`, as a user runs it."""

    def __init__(self, home, *words, within=(), **changes):
        self.home, self.outputs = home, home / "outputs"
        self.folder, self.log = self.outputs / "waits", home / "log"
        (home / "waits.yaml").write_text(yaml.safe_dump(STUDY | changes))
        words = ["-m", "study.launch", *(words or ("waits.yaml",)), "--address", "local"]
        self.process = subprocess.Popen(
            [*within, sys.executable, *words],
            cwd=home,
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def said(self):
        return " ".join(self.log.read_text().split())

    def records(self):
        path = self.folder / "trials.jsonl"
        return path.read_text().splitlines() if path.is_file() else []

    def until(self, holds):
        deadline = time.monotonic() + 300
        while not holds():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def end(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(120)


@pytest.fixture
def launch(tmp_path, with_victim):
    """The words and changes of a launch -> `Launched`; none outlives its test."""
    with_victim(tmp_path / "outputs")
    launches = []

    def start(*words, **changes):
        launches.append(Launched(tmp_path, *words, **changes))
        return launches[-1]

    yield start
    for one in launches:
        one.end()


def in_the_way(launched, name):
    """A file where the study wants to make a folder, from its begin on."""
    launched.until(launched.folder.is_dir)
    (launched.folder / name).write_text("in the way")
    return launched.folder / name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trials", "checkpoints"], ids=["the driver waits", "an actor waits"])
def test_a_disk_that_comes_back_costs_nothing(launch, name):
    launched = launch()
    obstacle = in_the_way(launched, name)
    launched.until(lambda: "waiting until it can be done" in launched.said())
    time.sleep(3)  # that it is tried again and again
    assert study_package.load("waits", launched.outputs).empty, "it is no verdict"
    obstacle.unlink()
    assert launched.process.wait(300) == 0, launched.said()
    trials = study_package.load("waits", launched.outputs)
    assert trials["number"].tolist() == [0, 1, 2]
    assert set(trials["status"]) == {"COMPLETE"}, trials["reason"].tolist()
    assert launched.said().count("waiting until it can be done") == 1, "it is said once"
    assert "going on" in launched.said()


@pytest.mark.slow
def test_a_disk_that_stays_away_ends_the_study_which_goes_on_later(launch):
    launched = launch(environment_timeout=4)
    obstacle = in_the_way(launched, "trials")
    assert launched.process.wait(300) == 2, launched.said()
    assert "--resume" in launched.said().split("error: ")[-1]
    assert "Traceback" not in launched.said()
    assert (launched.folder / "trials.jsonl").read_text() == ""
    obstacle.unlink()
    later = launch("--resume", "waits")
    assert later.process.wait(300) == 0, later.said()
    lines = (later.folder / "trials.jsonl").read_text().splitlines()
    found = sorted((json.loads(line)["number"], json.loads(line)["status"]) for line in lines)
    assert found == [(number, "COMPLETE") for number in range(3)]


@pytest.mark.slow
def test_lost_records_and_files_are_run_again_to_the_same_end(launch):
    """A torn line and a trial's file full of NULs, after the study was over."""
    launched = launch()
    assert launched.process.wait(300) == 0, launched.said()
    path = launched.folder / "trials.jsonl"
    lines = path.read_text().splitlines()
    before = {json.loads(line)["number"]: json.loads(line) for line in lines}
    path.write_text(lines[0] + "\n" + lines[1][:90] + "\n" + lines[2] + "\n")
    torn, damaged = (json.loads(lines[at])["number"] for at in (1, 2))
    masks = next((launched.folder / "trials" / f"{damaged:03d}").glob("*.safetensors"))
    masks.write_bytes(bytes(masks.stat().st_size))
    later = launch("--resume", "waits")
    assert later.process.wait(300) == 0, later.said()
    assert f"trial {torn} is run again" in later.said()
    assert f"trial {damaged} is run again" in later.said()
    assert "Traceback" not in later.said()
    after = {one["number"]: one for one in map(json.loads, path.read_text().splitlines())}
    assert set(after) == {0, 1, 2}
    for number, record in after.items():
        for key in ("parameters", "clean_accuracy", "attack_success", "passes"):
            assert record[key] == before[number][key], (number, key)


LOCK = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("waits/optuna.db", "Optuna's database .* does not let us in .*database is locked"),
        ("mlflow.db", "MLflow does not take what it is told"),
    ],
    ids=["optuna", "mlflow"],
)
def test_a_database_that_is_locked_for_two_minutes_is_waited_for_and_told(launch, name, told):
    launched = launch(trials=10)
    launched.until(lambda: len(launched.records()) >= 2)
    words = [sys.executable, "-c", LOCK, str(launched.outputs / name), "120"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as locking:
        assert locking.stdout.readline() == b"locked\n"
        assert locking.wait(200) == 0
    assert launched.process.wait(300) == 0, launched.said()
    trials = study_package.load("waits", launched.outputs)
    assert trials["number"].tolist() == list(range(10))
    assert set(trials["status"]) == {"COMPLETE"}, trials["reason"].tolist()
    assert "Traceback" not in launched.said()
    assert len(re.findall(told, launched.said())) == 1, launched.said()


FULL = """
set -e
cp -r outputs seed
mount -t tmpfs -o size=64m none outputs
cp -r seed/. outputs
"$@" &
while kill -0 $!; do
    if [ $(cat outputs/waits/trials.jsonl 2> /dev/null | wc -l) -ge 2 ]; then break; fi
    sleep 0.05
done
dd if=/dev/zero of=outputs/ballast bs=4k 2> /dev/null || true
sleep 20
cp outputs/waits/trials.jsonl while-full
rm outputs/ballast
code=0; wait $! || code=$?
cp -r outputs/. seed
exit $code
"""


@pytest.mark.slow
def test_a_disk_that_is_full_for_twenty_seconds_fails_no_trial(launch, tmp_path):
    within = ["unshare", "--mount", "--map-root-user", "sh", "-c", FULL, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*within[:3], "true"]).returncode:
        pytest.skip("no disk of our own may be mounted here")
    launched = launch(within=within, trials=8)
    assert launched.process.wait(400) == 0, launched.said()
    assert len((tmp_path / "while-full").read_text().splitlines()) < 8, "it was over before"
    trials = study_package.load("waits", tmp_path / "seed")
    assert trials["number"].tolist() == list(range(8))
    assert set(trials["status"]) == {"COMPLETE"}, trials["reason"].tolist()
    assert "Traceback" not in launched.said()
    assert launched.said().count("waiting until it can be done") == 1, launched.said()
