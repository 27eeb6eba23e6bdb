"""What a study is refused for before its first trial, and how it is sent to a cluster."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import yaml

from study import launch, search
from study.search import cluster, jobs, preflight, storage
from study.spec.config import StudyConfig, StudyError
from study.store.provenance import commit, sources, versions

STUDY = {
    "name": "tiny",
    "trials": 2,
    "gpus_per_trial": 0.5,
    "victims": [{"dataset": "digits", "net": "small_resnet", "attack": {"name": "badnets"}}],
    "reference_point": {"clean_accuracy": 0.3, "attack_success": 1.0},
    "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3}},
}
CONFIG = StudyConfig.model_validate(STUDY)
FINE = preflight.NodeReport(versions(), sources(), gpus=1, free=2**40, storage="", server="")


def complaints(report, **more):
    resources = {"CPU": 4, "GPU": 1}
    return preflight.problems(CONFIG, "Node 10.0.0.5", resources, report, storage="s3://b", **more)


def test_a_good_node_has_no_complaint():
    assert complaints(FINE) == []


@pytest.mark.parametrize(
    ("report", "says"),
    [
        (replace(FINE, versions=versions() | {"torch": "2.6.0"}), "has torch 2.6.0, the driver"),
        (replace(FINE, sources="0" * 16), "other sources of the project"),
        (replace(FINE, gpus=0), "offers 1 GPU.s., but torch can use 0"),
        (replace(FINE, storage="Permission denied"), "does not share the storage s3://b .Permission"),
        (replace(FINE, server="Connection refused"), "cannot reach MLflow .Connection refused."),
        (replace(FINE, free=2**29), "has 0.5 GB left"),
    ],
)
def test_each_fault_of_a_node_is_one_sentence_with_its_address(report, says):
    (sentence,) = complaints(report)
    assert sentence.startswith("Node 10.0.0.5 ")
    assert sentence.endswith(".")
    assert re.search(says, sentence)


def test_what_a_node_writes_must_reach_the_driver():
    (sentence,) = complaints(FINE, unseen="what it wrote there does not reach the driver")
    assert "does not share the storage" in sentence


@pytest.mark.parametrize(
    ("uri", "server"),
    [
        ("sqlite:////x/mlflow.db", None),
        ("http://127.0.0.1:5000", None),  # the driver's alone
        ("http://user:word@10.0.0.4:5000", ("10.0.0.4", 5000)),
        ("https://mlflow.example.org/a", ("mlflow.example.org", 443)),
    ],
)
def test_nodes_are_asked_for_servers_that_are_not_the_drivers_own(uri, server):
    assert preflight._server(uri) == server


@pytest.fixture(scope="module")
def own_ray():
    assert search.start_ray("local")
    yield
    search.stop_ray()


@pytest.mark.ray
@pytest.mark.parametrize("own", [False, True], ids=["a worker is asked", "this process answers"])
def test_real_nodes_pass_and_a_storage_that_is_none_does_not(tmp_path, own_ray, own):
    config = CONFIG.model_copy(update={"gpus_per_trial": 0})
    assert search.check_nodes(config, str(tmp_path / "shared"), "sqlite:///x", own=own) == 1
    assert list((tmp_path / "shared").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="driver cannot write to the storage .*file"):
        search.check_nodes(config, str(tmp_path / "file"), "sqlite:///x", own=own)
    with pytest.raises(StudyError, match="Node .* cannot reach MLflow"):
        search.check_nodes(config, str(tmp_path), "http://127.0.0.2:9", own=own)


@pytest.mark.ray
def test_workers_of_a_ray_of_our_own_have_our_variables(own_ray):
    read = ray.remote(os.getenv).remote
    assert all(ray.get(read(name)) == os.environ[name] for name in cluster.TO_ACTORS)


def test_storage_writes_reads_and_removes(tmp_path):
    place = str(tmp_path / "a" / "b")
    assert not storage.exists(place)
    storage.fetch(place, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    storage.write(place, "x", "text")
    assert storage.read(place, "x") == "text"
    assert storage.read((tmp_path / "a" / "b").as_uri(), "x") == "text"
    storage.remove(place)
    storage.remove(place)
    assert not storage.exists(place)


def test_sources_are_the_files_that_run_here():
    code = "from study.store.provenance import sources; print(sources())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == sources()


def test_outside_of_git_the_senders_commit_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("BIMASK_COMMIT", "0123456789ab")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    commit.cache_clear()
    try:
        assert commit() == "0123456789ab"
    finally:
        commit.cache_clear()


# --- joined or started ---


def addresses_of_a_study(*temporary):
    """Where a program that was told of no cluster finds its Ray, under each RAY_TMPDIR."""
    code = """
import os, sys, ray
from study import search
for folder in sys.argv[1:]:
    os.environ["RAY_TMPDIR"] = folder
    started = search.start_ray(None)
    print(started, ray.get_runtime_context().gcs_address)
    search.stop_ray()
"""
    words = [sys.executable, "-c", code, *temporary]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.ray
def test_a_cluster_that_ray_start_left_is_joined_and_the_ray_of_another_study_is_left_alone(own_ray):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # its sockets' names must be short
        words = [shutil.which("ray", path=Path(sys.executable).parent), "start", "--head", "--block"]
        words += ["--port=0", "--num-cpus=1", "--include-dashboard=false"]
        environment = os.environ | {"RAY_TMPDIR": folder}
        head = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environment)
        try:
            left = Path(folder) / "ray" / "ray_current_cluster"
            deadline = time.monotonic() + 120
            while not left.is_file():
                assert head.poll() is None
                assert time.monotonic() < deadline, "the head never came up"
                time.sleep(0.2)
            joined, own = addresses_of_a_study(folder, os.environ["RAY_TMPDIR"])
            assert joined == ["False", left.read_text()]
            assert own[0] == "True"
            assert own[1] not in (left.read_text(), ray.get_runtime_context().gcs_address)
        finally:
            head.terminate()  # of --block, which takes the processes of its node along
            head.wait()


# --- sent to a cluster ---


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Send a study from a folder to a cluster that is not there; the one sentence that it gets."""

    def send(path, *, cwd=tmp_path):
        monkeypatch.chdir(cwd)
        with pytest.raises(SystemExit) as caught:
            launch.main(Path(path), address="http://127.0.0.1:9")
        assert caught.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return send


def test_a_cluster_that_does_not_answer_is_one_sentence(tmp_path, refused):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(STUDY))
    assert "does not take the study" in refused("mine.yaml")


def test_mistakes_are_told_before_anything_is_sent(tmp_path, refused):
    (tmp_path / "bad.yaml").write_text("name: x\ntrails: 3\n")
    assert "trails: unknown key" in refused("bad.yaml")


def test_a_study_elsewhere_is_not_sent(tmp_path, refused):
    (tmp_path / "here").mkdir()
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(STUDY))
    assert "the folder that is sent" in refused("../mine.yaml", cwd=tmp_path / "here")


def test_secrets_data_and_results_are_not_packed(tmp_path):
    """Ray's own packing, with the patterns that a study is sent with."""
    from ray._private.runtime_env.packaging import create_package

    sent = ("study/launch.py", "mine.yaml", "models/mine.py", "models/mine.safetensors")
    kept = (".env", ".env.local", ".git/config", ".venv/x.py", ".ssh/id_ed25519", "data/cifar10/x.png")
    kept += ("outputs/tiny/trials.jsonl", "my.pem", "my.key", "mlflow.db", "deep/er/.env")
    for name in (*sent, *kept):
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text("canary")
    create_package(
        str(tmp_path / "project"),
        tmp_path / "package.zip",
        include_gitignore=True,
        excludes=jobs.LEFT_HERE,
    )
    listed = zipfile.ZipFile(tmp_path / "package.zip").namelist()
    assert {name for name in listed if not name.endswith("/")} == set(sent)
