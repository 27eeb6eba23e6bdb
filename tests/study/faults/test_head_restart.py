"""The head dies with all its nodes and the driver; a new cluster goes on with the study."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import optuna
import pytest
import yaml
from safetensors.torch import load_file

from bimask.victims import obtain_victim
from study.spec.config import StudyConfig
from study.trial.cases import Case
from study.trial.run import run_trials

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[3]
PATIENCE = 600  # seconds

STUDY = {
    "name": "restarted",
    "trials": 24,
    "clean_images_per_class": 2,
    "report_every": 20,
    "checkpoint_every": 0.2,
    "paper_defaults": False,
    "victims": [
        {"dataset": "digits", "image_size": 12, "net": "small_resnet", "width": 4, "epochs": 6}
        | {"attack": {"name": "badnets"}}
    ],
    "reference_point": {"clean_accuracy": 0.1, "attack_success": 1.0},
    "choose": {"max_accuracy_drop": 1.0},
    "fixed": {"inner_optimizer": "sign", "step_size": None, "patience": None}
    | {"initialise_rounds": 5, "minimise_rounds": 20, "select_rounds": 20},
    "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True}},
}
CLUSTER = """
import time
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
for _ in range(2):
    cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
time.sleep(7200)
"""


def start(home, *words, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *words], cwd=home, env=environment, text=True, **more)


def cluster_in(home):
    """A head and two nodes of one CPU: the process that has started them, their address."""
    process = start(home, "-c", CLUSTER, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    address = process.stdout.readline().strip()
    assert address, "the cluster did not start"
    return process, address


def kill_all(process, descendants):
    """SIGKILL to a process and all that it has started: a machine that loses its power."""
    for pid in descendants(process.pid):
        os.kill(pid, signal.SIGSTOP)  # none may see another die
    for pid in reversed(descendants(process.pid)):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def test_a_study_goes_on_on_another_cluster_when_its_head_is_gone(tmp_path, descendants):
    folder = tmp_path / "outputs/restarted"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))

    def known():
        path = folder / "trials.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return {record["number"]: record for record in map(json.loads, lines)}

    def launch(*words):
        log = (tmp_path / "log").open("a")
        return start(tmp_path, "-m", "study.launch", *words, stdout=log, stderr=log)

    cluster, address = cluster_in(tmp_path)
    try:
        driver = launch("study.yaml", "--address", address)
        deadline = time.monotonic() + PATIENCE
        while len(known()) < 5 or not any(folder.glob("checkpoints/*/*.safetensors")):
            assert driver.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kill_all(driver, descendants)
    finally:
        kill_all(cluster, descendants)
    before = known()
    assert 5 <= len(before) < 24
    cut = {int(path.parent.name) for path in folder.glob("checkpoints/*/*.safetensors")} - set(before)
    assert cut, "no trial was cut short"

    cluster, address = cluster_in(tmp_path)
    try:
        driver = launch("--resume", "restarted", "--address", address)
        assert driver.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
    finally:
        kill_all(cluster, descendants)
    assert len((folder / "trials.jsonl").read_text().splitlines()) == 24
    assert sorted(known()) == list(range(24))
    assert {record["status"] for record in known().values()} == {"COMPLETE"}
    assert {number: known()[number] for number in before} == before
    trials = optuna.load_study(
        study_name="restarted", storage=f"sqlite:///{folder / 'optuna.db'}"
    ).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 24
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'outputs/mlflow.db'}")
    experiment = client.get_experiment_by_name("bimask")
    runs = client.search_runs([experiment.experiment_id], "tags.trial != ''")
    assert sorted(int(run.data.tags["trial"]) for run in runs) == list(range(24))
    assert {run.info.status for run in runs} == {"FINISHED"}

    config = StudyConfig.model_validate(STUDY)
    victim = obtain_victim(config.victims[0], tmp_path / "outputs/victims")
    case = Case.of("digits-badnets", victim, config)
    for number in cut:
        settings = config.defence_config(known()[number]["parameters"])
        (whole,) = run_trials([settings], [case], seed=config.seed)
        kept = load_file(folder / f"trials/{number:03d}/digits-badnets.masks.safetensors")
        masks = whole.cases["digits-badnets"].tensors
        assert all((kept[name] == masks[name]).all() for name in masks), number
