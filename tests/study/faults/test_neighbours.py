"""Two studies at once on one machine, beside the Ray of another user."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user"),
]
ROOT = Path(__file__).parents[3]
STRANGER = 65534  # nobody
PATIENCE = 400  # seconds
STUDY = {
    "trials": 4,
    "concurrency": 1,
    "clean_images_per_class": 2,
    "paper_defaults": False,
    "victims": [
        {"dataset": "digits", "image_size": 8, "net": "small_resnet", "width": 2, "epochs": 3}
        | {"min_clean_accuracy": 0.0, "min_attack_success": 0.0, "attack": {"name": "badnets"}}
    ],
    "reference_point": {"clean_accuracy": 0.0, "attack_success": 1.0},
    "choose": {"max_accuracy_drop": 1.0},
    "fixed": {"inner_optimizer": "sign", "step_size": None, "patience": None, "inner_steps": 1}
    | {"initialise_rounds": 2, "minimise_rounds": 2, "select_rounds": 2},
    "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True}},
}


@pytest.fixture
def place():
    """A folder for temporary files that all users share, and with a short name."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


@pytest.fixture
def strangers_ray(place):
    """What another user's `ray start --head` left there, and runs; its process.

    It runs as this user, since another one may not be able to run this interpreter: what makes it a
    stranger's is the owner of what it left.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    words = [shutil.which("ray", path=Path(sys.executable).parent), "start", "--head", "--block"]
    words += ["--port=0", "--num-cpus=1", "--include-dashboard=false"]
    head = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=kept | {"RAY_TMPDIR": str(place)},
    )
    try:
        left, deadline = place / "ray/ray_current_cluster", time.monotonic() + PATIENCE
        while not left.is_file():
            assert head.poll() is None
            assert time.monotonic() < deadline, "the stranger's Ray never came up"
            time.sleep(0.2)
        os.chown(left, STRANGER, STRANGER)
        yield head
    finally:
        head.terminate()  # of --block, which takes the processes of its node along
        head.wait()


def test_two_studies_run_beside_each_other_and_a_strangers_ray(
    strangers_ray, place, tmp_path, with_store
):
    with_store(tmp_path / "outputs")
    address = (place / "ray/ray_current_cluster").read_text()
    studies = []
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"name": name} | STUDY))
        with (tmp_path / f"{name}.log").open("w") as log:
            studies.append(
                subprocess.Popen(
                    [sys.executable, "-m", "study.launch", f"{name}.yaml"],
                    cwd=tmp_path,
                    stdout=log,
                    stderr=log,
                    env=kept
                    | {"RAY_TMPDIR": str(place), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                )
            )
    try:
        codes = [study.wait(PATIENCE) for study in studies]
    finally:
        for study in studies:
            if study.poll() is None:
                study.kill()
                study.wait()
    for name, code in zip(("one", "two"), codes, strict=True):
        said = " ".join((tmp_path / f"{name}.log").read_text().split())
        assert code == 0, said
        assert f"The Ray at {address} on this machine belongs to nobody and is not joined" in said
        assert "Traceback" not in said
        lines = (tmp_path / "outputs" / name / "trials.jsonl").read_text().splitlines()
        found = sorted((json.loads(line)["number"], json.loads(line)["status"]) for line in lines)
        assert found == [(number, "COMPLETE") for number in range(4)]
    assert strangers_ray.poll() is None, "the stranger's Ray goes on"
    assert list(place.glob("bimask-*")) == []
