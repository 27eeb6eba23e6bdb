"""A study whose driver is killed, at whatever moment, goes on with --resume as if nothing had been.

Real processes, Ray, Optuna, MLflow and SQLite. The victim trains in seconds; a trial takes about two.
"""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import mlflow
import optuna
import pytest
import yaml
from safetensors.torch import load_file

from bimask.victims import obtain_victim
from study import launch
from study.spec.config import StudyConfig
from study.trial.cases import Case
from study.trial.run import run_trials

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]

STUDY = {
    "name": "endures",
    "trials": 5,
    "concurrency": 2,
    "paper_defaults": False,  # a minute of rounds that show nothing here
    "sampler": "random",
    "clean_images_per_class": 5,
    "report_every": 20,
    "checkpoint_every": 0.2,
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
        "batch_size": 32,  # of 50 images: the generator's state decides
        "initialise_rounds": 10,
        "minimise_rounds": 60,
        "select_rounds": 60,
        "warm_start": 0.5,
    },
    "space": {
        "mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True},
        "inner_steps": {"kind": "int", "low": 1, "high": 3},
    },
}

# Ray would put its workers behind all processes of the machine, and end them for what others take.
QUICK = {"RAY_worker_niceness": "0", "RAY_memory_monitor_refresh_ms": "0", "OMP_NUM_THREADS": "1"}


class Study:
    """A study as a user runs it, in a process of its own that can be killed."""

    def __init__(self, home, name, *, uri=None, **changes):
        self.home, self.name, self.outputs = home, name, home / "outputs"
        self.uri = uri or f"sqlite:///{self.outputs / 'mlflow.db'}"
        self.environment = {"MLFLOW_TRACKING_URI": uri} if uri else {}
        self.folder = self.outputs / name
        self.config = {**STUDY, "name": name, **changes}
        (home / f"{name}.yaml").write_text(yaml.safe_dump(self.config))

    def start(self, *words):
        words = words or (f"{self.name}.yaml",)
        self.log = (self.home / f"{self.name}.log").open("a")
        return subprocess.Popen(
            [sys.executable, "-m", "study.launch", *words, "--address", "local"],
            cwd=self.home,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **QUICK, **self.environment, "PYTHONPATH": str(ROOT)},
        )

    def resume(self):
        return self.start("--resume", self.name)

    def said(self):
        return (self.home / f"{self.name}.log").read_text()

    def records(self):
        path = self.folder / "trials.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return {record["number"]: record for record in map(json.loads, lines)}

    def reports(self):
        """Number and round of every report, as they came in."""
        path = self.folder / "reports.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [(report["number"], report["step"]) for report in map(json.loads, lines)]

    def progress(self):
        paths = (self.folder / "trials.jsonl", self.folder / "reports.jsonl")
        return [path.stat().st_size for path in paths if path.is_file()]

    def optuna_trials(self):
        storage = f"sqlite:///{self.folder / 'optuna.db'}"
        return optuna.load_study(study_name=self.name, storage=storage).get_trials()

    def mlflow_runs(self):
        """The parent runs, and the runs of trials."""
        client = mlflow.MlflowClient(self.uri)
        (experiment,) = client.search_experiments(filter_string="name = 'bimask'")
        runs = [
            run
            for run in client.search_runs([experiment.experiment_id])
            if run.data.tags.get("study") == self.name
        ]
        return [r for r in runs if "trial" not in r.data.tags], [
            r for r in runs if "trial" in r.data.tags
        ]

    def check(self):
        """Everything that must hold of a study at its end, whatever happened on the way."""
        numbers = list(range(self.config["trials"]))
        lines = (self.folder / "trials.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["number"] for line in lines) == numbers
        assert {record["status"] for record in self.records().values()} == {"COMPLETE"}
        assert [t.number for t in self.optuna_trials()] == numbers
        assert {t.state.name for t in self.optuna_trials()} == {"COMPLETE"}
        (parent,), trials = self.mlflow_runs()
        assert parent.info.status == "FINISHED"
        assert sorted(int(run.data.tags["trial"]) for run in trials) == numbers
        assert {run.info.status for run in trials} == {"FINISHED"}
        assert not any("reason" in run.data.tags for run in trials)
        for run in trials:
            record = self.records()[int(run.data.tags["trial"])]
            assert run.data.metrics["attack_success"] == record["attack_success"]
        assert not (self.folder / "checkpoints").exists()
        assert not list(self.folder.glob("ray*"))
        assert sorted(path.name for path in (self.folder / "trials").iterdir()) == [
            f"{number:03d}" for number in numbers
        ]
        summary = json.loads((self.folder / "summary.json").read_text())
        assert summary["n_complete"] == summary["n_trials"] == len(numbers)


def until(process, holds, seconds=3600):
    """Wait until something holds, while the process lives."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, "the study ended early"
        assert time.monotonic() < deadline, "it never held"
        time.sleep(0.05)


def kill(process):
    """SIGKILL: no handler runs, no file is closed."""
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def home(tmp_path_factory, with_victim):
    home = tmp_path_factory.mktemp("home")
    with_victim(home / "outputs")
    return home


def gone_on_with(study):
    """--resume in this process, which has imported everything: its exit code, and what it says."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said), pytest.raises(SystemExit) as caught:
        launch.main(outputs=study.outputs, resume=study.name, address="local", concurrency=1)
    return caught.value.code, " ".join(said.getvalue().split())


def interrupted(study, records):
    """The same, with ctrl-c as soon as there are so many records."""
    over = threading.Event()

    def press():
        while len(study.records()) < records:
            if over.wait(0.05):
                return
        os.kill(os.getpid(), signal.SIGINT)

    keyboard = threading.Thread(target=press)
    keyboard.start()
    try:
        return gone_on_with(study)
    finally:
        over.set()
        keyboard.join()


@pytest.fixture(scope="module")
def endured(home):
    """A study killed among trials that run and keep their states, then ended with ctrl-c."""
    shorter = {"minimise_rounds": 20, "select_rounds": 20}
    study = Study(home, "killed", fixed=STUDY["fixed"] | shorter)

    def cut():
        kept = study.folder.glob("checkpoints/*/*.safetensors")
        return {int(path.parent.name) for path in kept} - study.records().keys()

    process = study.start()
    until(process, cut)
    kill(process)
    study.cut = cut()
    code, said = interrupted(study, records=2)
    study.after_ctrl_c = SimpleNamespace(
        code=code,
        said=said,
        records=study.records(),
        summary=json.loads((study.folder / "summary.json").read_text()),
        best=(study.folder / "best.yaml").is_file(),
        runs=study.mlflow_runs(),
    )
    with (study.folder / "trials.jsonl").open("a") as file:
        file.write('{"number": 4, "stat')  # as a kill in the middle of a write would leave it
    code, said = gone_on_with(study)
    assert code == 0, said
    return study


def test_nothing_is_lost_doubled_or_left_running(endured):
    endured.check()
    for number, record in endured.after_ctrl_c.records.items():
        assert endured.records()[number] == record, "it was run again"


def test_ctrl_c_ends_with_the_front_so_far_and_can_be_gone_on_with(endured):
    then = endured.after_ctrl_c
    assert then.code == 130
    assert "Pareto front of killed" in then.said
    assert "go on with --resume" in then.said
    assert then.best
    assert 2 <= then.summary["n_trials"] < 5
    (parent,), trials = then.runs
    assert parent.info.status == "KILLED"
    assert "RUNNING" not in {run.info.status for run in trials}


def test_trials_that_were_cut_short_end_with_the_bits_of_whole_ones(endured):
    config = StudyConfig.model_validate(endured.config)
    victim = obtain_victim(config.victims[0], endured.outputs / "victims")
    case = Case.of("digits-badnets", victim, config)
    assert endured.cut, "no trial was cut short"
    for number in endured.cut:
        record = endured.records()[number]
        settings = config.defence_config(record["parameters"])
        (whole,) = run_trials([settings], [case], seed=config.seed)
        kept = load_file(endured.folder / f"trials/{number:03d}/digits-badnets.masks.safetensors")
        masks = whole.cases["digits-badnets"].tensors
        assert all((kept[name] == masks[name]).all() for name in masks)
        assert record["attack_success"] == whole.scores["attack_success"]


def test_a_resume_suggests_nothing_twice(endured):
    searched = [tuple(trial.params.values()) for trial in endured.optuna_trials() if trial.params]
    assert len(set(searched)) == len(searched) == 5


def test_a_finished_study_says_so(endured):
    before = (endured.folder / "summary.json").stat().st_mtime_ns
    code, said = gone_on_with(endured)
    assert code == 0
    assert "is finished, all 5 trials" in said
    assert (endured.folder / "summary.json").stat().st_mtime_ns == before


@pytest.fixture
def refused(capsys):
    """What the command says in this process where it refuses to go on."""

    def sentence(study, *words, **options):
        with pytest.raises(SystemExit) as caught:
            launch.main(*words, outputs=study.outputs, **options)
        assert caught.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return sentence


def test_a_study_that_changed_is_refused(endured, refused):
    changed = {**endured.config, "seed": 7}
    (endured.home / "changed.yaml").write_text(yaml.safe_dump(changed))
    sentence = refused(endured, endured.home / "changed.yaml", resume="killed")
    assert "only checkpoint_every, concurrency" in sentence


def test_a_name_that_nobody_knows_is_refused(endured, refused):
    assert "there are: killed" in refused(endured, resume="nobody")


@pytest.mark.slow
def test_ten_kills_at_random_moments(home):
    """Bar 3 of the endurance: 24 trials, SIGKILL at ten random moments, --resume after each."""
    draw = random.Random(0)
    study = Study(home, "ten", trials=24)
    process, sessions = study.start(), []
    until(process, lambda: (study.folder / "study.yaml").is_file())
    for number in range(10):
        if number % 2:  # anywhere in the coming up of a driver, of Ray, of the actors
            time.sleep(draw.uniform(0, 20))
        else:  # among trials that run, end and are written down
            seen = study.progress()
            until(process, lambda: study.progress() != seen)  # noqa: B023
            time.sleep(draw.uniform(0, 4))
        assert process.poll() is None, "make the trials longer: it was over before the tenth kill"
        kill(process)
        sessions.append(len(study.reports()))
        process = study.resume()
    assert process.wait() == 0, study.said()
    study.check()
    # what a kill cost a trial that ran: the reports that came twice, one at each end beside those of an
    # interval at the pace of the quickest trial
    pace = max(record["rounds"] / record["seconds"] for record in study.records().values())
    allowed = 2 + STUDY["checkpoint_every"] * pace / STUDY["report_every"]
    lost = [again for at in sessions for again in repeated(study.reports(), at).values()]
    print(f"{len(lost)} trials were cut short; reports again: {sorted(lost)}, allowed {allowed:.1f}")
    assert lost, "no kill hit a trial that had reported"
    assert max(lost) <= allowed


def repeated(reports, at):
    """Of the trials that ran when `at` reports had come: how many of its reports came again."""
    before, after = reports[:at], reports[at:]
    running = {number for number, _ in before} & {number for number, _ in after}
    return {
        number: len(
            {step for n, step in before if n == number} & {step for n, step in after if n == number}
        )
        for number in running
    }


@pytest.mark.slow
def test_a_server_that_is_dead_for_a_minute_in_mid_study(home, server):
    """Bar 4: MLflow's server is killed for 60 s while trials run and end."""
    study = Study(home, "served", uri=server.uri, trials=12)
    process = study.start()
    until(process, study.records)
    server.kill()
    time.sleep(60)
    server.start()
    assert process.wait() == 0, study.said()
    assert "MLflow does not take what it is told" in " ".join(study.said().split())
    study.check()
