"""Bad input gets one clear sentence and exit code 2, and leaves nothing half-written."""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml

from bimask.victims import VictimSpec
from study import launch
from study.spec.config import StudyError
from study.tracking.mlflow_runs import Tracker

VICTIM = {
    "dataset": "digits",
    "image_size": 12,
    "net": "small_resnet",
    "width": 4,
    "attack": {"name": "badnets"},
    "epochs": 6,
}
STUDY = {
    "name": "bad",
    "trials": 2,
    "clean_images_per_class": 2,
    "victims": [VICTIM],
    "reference_point": {"clean_accuracy": 0.5, "attack_success": 1.0},
    "space": {"mask_lr": {"kind": "float", "low": 0.01, "high": 0.1}},
}


def changed(base=STUDY, /, **keys):
    return {**base, **keys}


def with_victim(**keys):
    return changed(victims=[changed(VICTIM, **keys)])


@pytest.fixture
def refused(tmp_path, capsys):
    """Run the command in this process; give its one sentence."""

    def run(study, *, outputs=None, **options):
        path = tmp_path / "bad.yaml"
        path.write_text(yaml.safe_dump(study))
        outputs = outputs or tmp_path / "outputs"
        before = set(outputs.rglob("*")) if outputs.is_dir() else set()
        with pytest.raises(SystemExit) as caught:
            launch.main(path, outputs=outputs, **options)
        assert caught.value.code == 2
        after = set(outputs.rglob("*")) if outputs.is_dir() else set()
        assert after == before, "something was left behind"
        shown = capsys.readouterr().err.strip()
        assert "Traceback" not in shown
        assert shown.startswith("error: ")
        return " ".join(shown.split())

    return run


def without_batch_norms():
    """A defence that can do nothing for the net of the victim; no victim is trained for that."""
    study = with_victim(net="vit_tiny", width=16, image_size=16) | {"defence": "clp", "fixed": {}}
    return study | {"space": {"u": {"kind": "float", "low": 1, "high": 5}}}


@pytest.mark.parametrize(
    ("study", "options", "expected"),
    [
        (changed(extra=1), {}, "extra: unknown key"),
        (changed(trials="some"), {}, "got 'some'"),
        (changed(space={"mask_lr": {"kind": "float", "low": 1, "high": 0.1}}), {}, "`low < high`"),
        (changed(space={}), {}, "space: "),
        (with_victim(dataset="cifar11"), {}, "unknown dataset 'cifar11', known are cifar10"),
        (changed(clean_images_per_class=10_000), {}, "10000 clean images a class were asked for"),
        (STUDY, {"trials": 0}, "greater than or equal to 1, got 0"),
        (STUDY, {"concurrency": -1}, "concurrency"),
        (changed(device="tpu9"), {}, "The device 'tpu9' cannot be used here"),
        (changed(device="cuda:7"), {}, "The device 'cuda:7' cannot be used here"),
        (STUDY, {"name": "a/b"}, "name: "),
        (with_victim(attack={"name": "badnets", "colour": "red"}), {}, "no hyper-parameter 'colour'"),
        (with_victim(dataset="imagefolder:/no/such/place"), {}, "There is no folder /no/such/place"),
        (with_victim(attack={"name": "badnets", "target": 10}), {}, "`target` must be one of"),
        (with_victim(attack={"name": "badnets", "size": 99}), {}, "A patch of 99 pixels does not fit"),
        (without_batch_norms(), {}, "The victim digits-badnets: CLP prunes batch norms"),
        (with_victim(epochs=1, min_attack_success=1.0), {}, "was not learned (ACC"),
        pytest.param(
            with_victim(epochs=1, min_clean_accuracy=1.0, min_attack_success=0.0),
            {},
            "is poor (ACC",
            marks=pytest.mark.slow,  # another Ray for a second sentence of the same place
        ),
    ],
)
@pytest.mark.ray
@pytest.mark.usefixtures("kept_ray")
def test_one_sentence_and_nothing_left(refused, study, options, expected):
    if "victims" in study and study["victims"][0].get("min_attack_success") is not None:
        options = {**options, "address": "local"}
    assert expected in refused(study, **options)


@pytest.mark.ray
@pytest.mark.usefixtures("kept_ray")
def test_a_gpu_share_without_a_gpu(refused):
    assert "Ray sees no GPU" in refused(changed(gpus_per_trial=0.5), address="local")


def test_no_cluster_at_the_address(refused):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "Cannot join Ray" in refused(STUDY, address=f"127.0.0.1:{port}")


def test_an_mlflow_server_that_is_not_there(refused, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    assert "does not answer" in refused(STUDY)


def test_a_store_that_is_no_database(tmp_path):
    broken = tmp_path / "mlflow.db"
    broken.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with pytest.raises(StudyError, match="cannot be opened"):
        Tracker(f"sqlite:///{broken}", tmp_path / "mlartifacts")


def test_an_unwritable_folder(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "Cannot write to the folder" in refused(STUDY, outputs=tmp_path / "file" / "outputs")


def test_a_name_that_is_taken(refused, tmp_path):
    (tmp_path / "outputs" / "mine").mkdir(parents=True)
    assert "'mine' exists" in refused(STUDY, name="mine")


def test_an_offline_download_names_the_folder_to_fill(refused, tmp_path, monkeypatch):
    """A proxy where nobody listens: real torchvision, no network."""
    monkeypatch.setenv("BIMASK_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    # the opener that urllib makes once remembers its proxies
    monkeypatch.setattr(urllib.request, "_opener", None)
    sentence = refused(with_victim(dataset="cifar10"))
    assert str(tmp_path / "cache" / "cifar10") in sentence
    assert "cannot be downloaded" in sentence


@pytest.mark.parametrize(
    "damage",
    ["weights", *(pytest.param(name, marks=pytest.mark.slow) for name in ("manifest", "missing"))],
)
@pytest.mark.ray
@pytest.mark.usefixtures("kept_ray")
def test_a_damaged_victim(refused, tmp_path, damage, with_victim):
    root = with_victim(tmp_path / "outputs") / "victims"
    spec = VictimSpec(**VICTIM)
    weights, manifest = root / spec.digest / "victim.safetensors", root / spec.digest / "manifest.json"
    if damage == "weights":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        expected = "The digest of"
    elif damage == "manifest":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()))[:100])
        expected = "cannot be read"
    else:
        weights.unlink()
        expected = "is missing"
    assert expected in refused(STUDY, address="local")


def test_the_command_itself_says_so_and_exits_with_2(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(changed(trails=3)))
    done = subprocess.run(
        [sys.executable, "-m", "study.launch", str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(launch.__file__).parents[1])},
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith("trails: unknown key; did you mean trials?")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.yaml"]
