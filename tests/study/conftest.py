"""Shared by the tests of the study: no servers from outside, an MLflow server, a study of 200 trials.

The large study was never searched: it is a few real purifications, their scores moved about. What reads
a study's records cannot tell, and a search would take half an hour.
"""

import copy
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import mlflow
import pytest
import ray
import yaml
from filelock import FileLock
from playwright.sync_api import sync_playwright
from safetensors.torch import save_file

from bimask.defences.ims.config import PurifyConfig
from bimask.victims import VictimSpec, obtain_victim
from study import search
from study.pipeline.summary import summarise
from study.spec.config import StudyConfig
from study.store import records
from study.store.schema import SCHEMA
from study.trial.cases import Case
from study.trial.run import run_trials
from study.trial.suite import confirmation, roles

ROOT = Path(__file__).parents[2]
VICTIM = {
    "dataset": "digits",
    "image_size": 12,
    "net": "small_resnet",
    "width": 4,
    "epochs": 8,
    "min_clean_accuracy": 0.0,
    "min_attack_success": 0.0,
}
SMALL = {
    "dataset": "digits",
    "image_size": 12,
    "net": "small_resnet",
    "width": 4,
    "attack": {"name": "badnets"},
    "epochs": 6,
}
STUDY = {
    "name": "large",
    "trials": 200,
    "clean_images_per_class": 3,
    "victims": [
        {**VICTIM, "attack": {"name": "badnets"}},
        {**VICTIM, "attack": {"name": "blended", "alpha": 0.3}},
    ],
    "held_out": [{**VICTIM, "attack": {"name": "sig", "frequency": 2}, "poisoning_rate": 0.05}],
    "controls": [{**VICTIM, "attack": {"name": "badnets"}, "poisoning_rate": 0.0}],
    "reference_point": {"clean_accuracy": 0.3, "attack_success": 1.0},
    "choose": {"max_accuracy_drop": 0.1},
    "fixed": {
        "step_size": None,
        "patience": None,
        "initialise_rounds": 2,
        "minimise_rounds": 2,
        "select_rounds": 4,
    },
    "space": {
        "mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True},
        "universal": {"kind": "float", "low": 0.0, "high": 1.0},
        "inner_steps": {"kind": "int", "low": 1, "high": 3},
        "inner_optimizer": {"kind": "categorical", "choices": ["adamw", "sign"]},
        "inner_momentum": {"kind": "float", "low": 0, "high": 0.9, "when": {"inner_optimizer": "sign"}},
    },
}
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
PURIFIED = 4  # configurations that are really run
FAILED, PRUNED = 10, 20
REASON = (
    "NonFiniteError: <b>The loss</b> of round 3 is nan.</script><script>document.title='taken'</script>"
)

SERVERS = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "RAY_ADDRESS")


@pytest.fixture
def shipped_studies():
    found = sorted((ROOT / "search_spaces").rglob("*.yaml"))
    return [path for path in found if "tuning" not in yaml.safe_load(path.read_text())]  # a comparison


@pytest.fixture(scope="session", autouse=True)
def _no_servers_from_outside():
    with pytest.MonkeyPatch.context() as patch:
        for name in SERVERS:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def _no_servers_left_behind():
    yield
    assert not [name for name in SERVERS if name in os.environ], "the next test would be sent there"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """A real `mlflow server` on a port of its own, which can be killed and started again."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                *("--port", str(self.port)),
                *("--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"),
                *("--artifacts-destination", str(self.folder / "server-artifacts")),
            ],
            cwd=self.folder,
            stdout=(self.folder / "server.log").open("a"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                assert time.monotonic() < deadline, "the server never came up"
                time.sleep(0.2)

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, worker_id):
    """A name and what fills a folder -> that folder, made once for all processes of the tests.

    It is for reading: who writes takes a copy.
    """

    def made(name, fill):
        if worker_id == "master":
            fill(folder := tmp_path_factory.mktemp(name))
            return folder
        common = tmp_path_factory.getbasetemp().parent / name
        with FileLock(common.with_suffix(".lock")):
            if not common.exists():
                fill(part := tmp_path_factory.mktemp("part"))
                part.rename(common)
        return common

    return made


@pytest.fixture(scope="session")
def with_store(made_once):
    """A folder -> the same with MLflow's tables in a file; to make those takes MLflow seconds."""

    def fill(folder):
        mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()

    made = made_once("store", fill)

    def put(folder, name="mlflow.db"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / "mlflow.db", folder / name)
        return folder

    return put


@pytest.fixture(scope="session")
def with_victim(made_once, with_store):
    """A folder -> the same with MLflow's tables, and the victim that the small studies share."""

    def fill(folder):
        obtain_victim(VictimSpec(**SMALL), folder)

    made = made_once("victims", fill)

    def put(outputs):
        shutil.copytree(made, with_store(outputs) / "victims")
        return outputs

    return put


@pytest.fixture(scope="module")
def kept_ray():
    """One real Ray for the studies of a file, of which each would start and end its own."""
    start, stop = search.start_ray, search.stop_ray

    def start_once(address, say=print):
        return (address == "local" and ray.is_initialized()) or start(address, say)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "start_ray", start_once)
        patch.setattr(search, "stop_ray", lambda: None)
        yield
    stop()


@pytest.fixture
def server(tmp_path, with_store):
    server = Server(with_store(tmp_path, "server.db"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def large_study(tmp_path_factory, made_once):
    """The folder of a study of 200 trials on two victims: 10 failed, 20 stopped early."""
    mine = tmp_path_factory.mktemp("mine")
    shutil.copytree(made_once("large", make_study), mine, dirs_exist_ok=True)
    return mine / STUDY["name"]


@pytest.fixture
def study_of(tmp_path):
    """A victim's settings -> the folder of a small study on it alone."""

    def make(victim):
        return make_study(tmp_path, 40, name="small", victims=[victim], held_out=[], controls=[])

    return make


def make_study(outputs, trials=STUDY["trials"], **changes):
    """Write the records of a study to `outputs/NAME` and return the folder."""
    config = StudyConfig.model_validate(STUDY | {"trials": trials} | changes)
    folder = outputs / config.name
    folder.mkdir(parents=True)
    suite = {
        name: obtain_victim(spec, outputs / "victims")
        for name, spec in zip(config.suite_names(), config.suite, strict=True)
    }
    victims = {name: suite[name] for name in config.victim_names()}
    rng = random.Random(0)
    searched = [_parameters(rng) for _ in range(trials)]
    cases = [Case.of(name, victim, config) for name, victim in victims.items()]
    reports = []

    def report(trial, victim, log, scores):
        reports.append((trial, {"victim": victim, "step": log.step, **asdict(scores)}))

    real = run_trials(
        [config.defence_config(p) for p in searched[:PURIFIED]],
        cases,
        seed=0,
        report_every=2,
        on_report=report,
    )
    ended = rng.sample(range(PURIFIED, trials), FAILED + PRUNED)
    lost, stopped = set(ended[:FAILED]), set(ended[FAILED:])
    rows, told = [], []
    for number, parameters in enumerate(searched):
        source = number % PURIFIED
        row = _record(config, victims, number, parameters, real[source], rng)
        if number in lost:
            row = {key: row[key] for key in ("number", "preset", "parameters", "seconds", "provenance")}
            row |= {"status": "FAILED", "reason": REASON}
        elif number in stopped:
            row = {key: row[key] for key in ("number", "preset", "parameters", "seconds", "provenance")}
            row |= {"status": "PRUNED", "reason": "dominated whatever the 1 run(s) left give"}
        else:
            _files(folder / "trials" / f"{number:03d}", real[source])
            told += [{"number": number, **report} for trial, report in reports if trial == source]
        rows.append(row)
    (folder / records.TRIALS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / records.REPORTS).write_text("".join(json.dumps(report) + "\n" for report in told))
    (folder / records.STUDY).write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    summary = summarise(config, folder, rows, victims)
    summary["suite"] = confirmation(_confirmed(config, suite, rng), suite)
    summary["seconds"] = {"total": 900.0, "in_trials": 800.0, "harness": 40.0}
    (folder / records.SUMMARY).write_text(json.dumps(summary))
    return folder


def _parameters(rng):
    parameters = {
        "mask_lr": 0.02 * 15 ** rng.random(),
        "universal": rng.random(),
        "inner_steps": rng.randint(1, 3),
        "inner_optimizer": rng.choice(["adamw", "sign"]),
    }
    if parameters["inner_optimizer"] == "sign":
        parameters["inner_momentum"] = 0.9 * rng.random()
    return parameters


def _record(config, victims, number, parameters, result, rng):
    """A trial's record: number 0 is called the paper's defaults; settings move the scores."""
    record = copy.deepcopy(result.outcome())
    for scores in record["scores"].values():
        strength = min(1.0, parameters["mask_lr"] / 0.3 + rng.gauss(0, 0.1))
        scores["clean_accuracy"] = min(1.0, max(0.0, 0.97 - 0.1 * strength**2 + rng.gauss(0, 0.01)))
        scores["attack_success"] = min(1.0, max(0.0, 0.9 * (1 - strength) + rng.gauss(0, 0.03)))
        scores["recovery"] = 1 - scores["attack_success"]
    for name in config.task.metrics:
        record[name] = sum(scores[name] for scores in record["scores"].values()) / len(victims)
    return {
        "schema": SCHEMA,
        "number": number,
        "status": "COMPLETE",
        "reason": None,
        "preset": None if number else "paper",
        "parameters": parameters if number else PurifyConfig().model_dump(),
        **record,
        "seconds": rng.uniform(2, 9) if number else 120.0,
        "device": "cpu",
        "ended": 1.7e9 + number,
        "provenance": {
            "study": config.digest,
            "victims": {name: victim.spec.digest for name, victim in victims.items()},
            "seed": 0,
            "commit": "0123456789ab",
            "versions": {"torch": "2.0"},
        },
    }


def _confirmed(config, suite, rng):
    """Three runs of two configurations on every victim, as the confirmation records them."""
    return [
        {
            "schema": SCHEMA,
            "configuration": configuration,
            "victim": name,
            "role": role,
            "seed": seed,
            "test": {
                "clean_accuracy": 0.95,
                "attack_success": least + 0.1 * rng.random(),
                "recovery": 0.9,
            },
            "accuracy_drop": rng.uniform(-0.005, 0.02),
        }
        for configuration, least in (("chosen", 0.02), ("paper_defaults", 0.8))
        for name, role in roles(config).items()
        for seed in range(3)
    ]


def _files(kept, result):
    kept.mkdir(parents=True)
    for name, case in result.cases.items():
        save_file(case.tensors, kept / f"{name}.masks.safetensors")
        (kept / f"{name}.rounds.json").write_text(
            json.dumps([asdict(log) for log in case.result.history])
        )


@pytest.fixture(scope="session")
def mlflow_server():
    """A function: a real `mlflow server` over a store, on loopback; its address."""

    @contextmanager
    def serve(uri, folder=None):
        """`folder`: where it keeps the artifacts that it is sent."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
        process = subprocess.Popen(
            [*command, "--workers", "1", "--port", str(port)],
            cwd=folder,
            env=os.environ
            | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=2).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)

    return serve


@pytest.fixture(scope="session")
def browser():
    """The machine's own Chromium, driven by Playwright."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None and "CI" not in os.environ:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=QUIET)
        yield browser
        browser.close()
