"""A study that is ended, or loses its Ray, in each of its phases, as a process of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[3]
PATIENCE = 300  # seconds
END = 60  # seconds: a study that has to be ended by force has hung
VICTIM = {
    "dataset": "digits",
    "image_size": 12,
    "net": "small_resnet",
    "width": 4,
    "attack": {"name": "badnets"},
    "epochs": 6,
}
STUDY = {
    "name": "ends",
    "trials": 60,
    "concurrency": 1,
    "clean_images_per_class": 2,
    "paper_defaults": False,
    "victims": [VICTIM],
    "confirm": {"seeds": 40},
    "reference_point": {"clean_accuracy": 0.1, "attack_success": 1.0},
    "choose": {"max_accuracy_drop": 1.0},
    "fixed": {"inner_optimizer": "sign", "step_size": None, "patience": None}
    | {"initialise_rounds": 2, "minimise_rounds": 2, "select_rounds": 2},
    "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True}},
}


def heard():
    """No signal is ignored, as it is by what `nohup` or a shell's background has started."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def children(pid):
    """The pids of what a process has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


class Launched:
    """`python -m study.launch` in a session of its own; its output goes to a file."""

    def __init__(self, home, *words, out=None, **environment):
        self.home, self.log = home, home / "log"
        self.folder = home / "outputs/ends"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "study.launch", *words],
                cwd=home,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
                stdout=log if out is None else out,
                stderr=log,
                start_new_session=True,
                preexec_fn=heard,
            )

    def until(self, holds):
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def trials(self):
        path = self.folder / "trials.jsonl"
        return len(path.read_text().splitlines()) if path.is_file() else 0

    def rays(self):
        """Pids of this study's Ray by the names of its programs."""
        found = {}
        for pid in children(self.process.pid):
            found[Path(f"/proc/{pid}/comm").read_text().strip()] = pid
        for pid in children(found.get("raylet", self.process.pid)):
            name = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]
            if name.endswith("Agent"):
                found[name.removeprefix("ray::")] = pid
        return found

    def last_words(self):
        """All that was said, once --resume is named: Ray may end the process before it can do so."""
        deadline = time.monotonic() + 30
        while "--resume ends" not in (said := self.log.read_text()):
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        return said

    def wait(self):
        try:
            return self.process.wait(END)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def in_victims(ran):
    return any((ran.home / "outputs/victims").glob(".training-*/*"))


def in_search(ran):
    return ran.trials() >= 2


def in_confirmation(ran):
    return (ran.folder / "confirm.jsonl").is_file()


def in_summary(ran):
    return (ran.folder / "summary.json").is_file()


@pytest.fixture(scope="module")
def cached(tmp_path_factory, with_victim):
    """Outputs with a trained victim and MLflow's tables: what a study needs before its first trial."""
    return with_victim(tmp_path_factory.mktemp("cached") / "outputs")


@pytest.fixture
def launch(tmp_path, cached):
    """Changes to the study, words and variables -> it, launched."""
    runs = []

    def start(*words, out=None, environment=None, **changes):
        tmp_path.mkdir(exist_ok=True)
        if not (tmp_path / "outputs").exists():
            shutil.copytree(cached, tmp_path / "outputs")
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | changes))
        runs.append(Launched(tmp_path, *(words or ("study.yaml",)), out=out, **(environment or {})))
        return runs[-1]

    yield start
    for ran in runs:
        if ran.process.poll() is None:
            os.killpg(ran.process.pid, signal.SIGKILL)
            ran.process.wait()


@pytest.fixture
def place(tmp_path_factory, monkeypatch):
    """The folder in which this test's Rays lie."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def test_a_signal_to_the_whole_group_ends_the_search_with_the_front(launch, place):
    ran = launch()
    ran.until(lambda: in_search(ran))
    os.killpg(ran.process.pid, signal.SIGTERM)
    assert ran.wait() == 128 + signal.SIGTERM, ran.log.read_text()
    said = ran.log.read_text()
    assert "--resume ends" in said
    assert "Traceback" not in said
    assert json.loads((ran.folder / "summary.json").read_text())["n_complete"] >= 2
    assert list(place.iterdir()) == [], "Ray's folder is removed"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("phase", "changes"),
    [
        (in_victims, {"victims": [VICTIM | {"epochs": 3000}]}),
        (in_search, {}),
        (in_confirmation, {"trials": 2}),
        (in_summary, {"trials": 2, "confirm": {"seeds": 1}}),
    ],
)
def test_a_signal_ends_every_phase_with_its_code(launch, place, phase, changes, number):
    ran = launch(**changes)
    ran.until(lambda: phase(ran))
    os.killpg(ran.process.pid, number)
    assert ran.wait() == 128 + number, ran.log.read_text()
    said = ran.log.read_text()
    assert "Traceback" not in said
    assert ("launch it again" if phase is in_victims else "--resume ends") in said
    assert list(place.iterdir()) == []
    if phase is not in_victims:
        again = launch("--resume", "ends", **changes)
        if phase is in_search:
            again.until(lambda: again.trials() > 10)
        else:
            assert again.process.wait(PATIENCE) == 0, again.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("which", ["gcs_server", "raylet", "DashboardAgent", "RuntimeEnvAgent"])
@pytest.mark.parametrize(
    ("phase", "changes"), [(in_search, {"retries": 0}), (in_confirmation, {"trials": 2})]
)
def test_a_ray_that_dies_ends_the_study_which_names_resume(launch, place, which, phase, changes):
    ran = launch(**changes)
    ran.until(lambda: phase(ran))
    os.kill(ran.rays()[which], signal.SIGKILL)
    assert ran.wait() == 1, ran.log.read_text()
    said = ran.last_words()
    assert "Pareto front of ends" in said
    assert "Traceback" not in said
    records = [json.loads(x) for x in (ran.folder / "trials.jsonl").read_text().splitlines()]
    assert {record["status"] for record in records} == {"COMPLETE"}
    if phase is in_confirmation:
        rows = [json.loads(x) for x in (ran.folder / "confirm.jsonl").read_text().splitlines()]
        assert not any(row.get("reason") for row in rows)


@pytest.mark.slow
def test_a_raylet_that_dies_while_ray_starts_is_started_again(launch, place):
    ran = launch()
    ran.until(lambda: "raylet" in ran.rays())
    os.kill(ran.rays()["raylet"], signal.SIGKILL)
    ran.until(lambda: in_search(ran))


@pytest.mark.slow
def test_a_gcs_that_dies_while_ray_starts_is_no_hang(launch, place):
    """`ray.init` waits for a GCS that is gone as long as it takes."""
    ran = launch()
    ran.until(lambda: "gcs_server" in ran.rays())
    os.kill(ran.rays()["gcs_server"], signal.SIGKILL)
    assert ran.wait() == 1, ran.log.read_text()
    said = ran.log.read_text()
    assert "Ray died (gcs_server ended with code -9 while it started)" in said
    assert "Traceback" not in said
    deadline = time.monotonic() + 30
    while list(place.iterdir()):
        assert time.monotonic() < deadline, "Ray's folder stays"
        time.sleep(0.1)


@pytest.mark.slow
def test_signals_to_ray_and_study_alike_end_with_the_signals_code(launch, place):
    """What systemd does: every process of the unit is sent the signal."""
    ran = launch()
    ran.until(lambda: in_search(ran))
    for pid in (ran.process.pid, *ran.rays().values()):
        os.kill(pid, signal.SIGTERM)
    assert ran.wait() == 128 + signal.SIGTERM, ran.log.read_text()
    assert "Traceback" not in ran.log.read_text()
    assert "--resume ends" in ran.log.read_text()  # the front is there unless Tune waits for the GCS


def processes_of(place):
    """The commands of other processes whose environment names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(place).encode() in path.read_bytes() and path.parent.name != str(os.getpid()):
                found.append((path.parent / "cmdline").read_bytes())
        except OSError:
            continue
    return found


def test_nothing_of_ray_outlives_a_study_that_is_killed(launch, place):
    ran = launch()
    ran.until(lambda: in_search(ran))
    ran.process.kill()
    ran.process.wait()
    deadline = time.monotonic() + 30
    while list(place.iterdir()):
        assert time.monotonic() < deadline, "Ray's folder stays"
        time.sleep(0.1)
    while left := processes_of(place):  # the watchdog removes the folder, and then ends itself
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert "Pareto front of ends so far" in ran.last_words()


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_failure(launch, place):
    reader, writer = os.pipe()
    ran = launch(trials=2, confirm={"seeds": 1}, out=writer)
    os.close(writer)
    os.close(reader)
    assert ran.process.wait(PATIENCE) == 0, ran.log.read_text()
    assert "Traceback" not in ran.log.read_text()
