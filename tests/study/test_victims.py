"""`python -m study.victims`: a suite of victims made by Ray tasks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from bimask.victims import VictimSpec, load_victim, train_victim

ROOT = Path(__file__).parents[2]
HASTY = {"image_size": 8, "width": 2, "epochs": 2, "min_clean_accuracy": 0, "min_attack_success": 0}


@pytest.mark.ray
@pytest.mark.slow
def test_a_suite_on_ray_is_that_of_one_process(tmp_path):
    good = [{"poisoning_rate": 0}, {"attack": {"name": "ssba", "steps": 2}}]
    bad = {"attack": {"name": "sig"}, "poisoning_rate": 0.5}
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"common": HASTY, "victims": [*good, bad]}))

    def run(*options):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "study.victims",
                str(path),
                "--out",
                str(tmp_path / "out"),
                *options,
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"COLUMNS": "200", "RAY_ADDRESS": "local"},
        )
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    code, said = run()
    assert code == 1, said
    assert "digits-sig: failed, DataError: A poisoning rate of 0.5" in said
    assert said.count(": made, ") == 2
    folders = sorted(folder.name for folder in (tmp_path / "out").iterdir())
    specs = [VictimSpec(**HASTY, **own) for own in good]
    assert folders == sorted(spec.digest for spec in specs)
    for spec in specs:
        made, alone = load_victim(tmp_path / "out" / spec.digest), train_victim(spec)
        weights, wanted = made.model.state_dict(), alone.model.state_dict()
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    code, said = run("--cpus-per-victim", "4000")
    assert code == 2, said
    assert "asks for 4000 CPU(s)" in said


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_making_with_its_code_and_a_sentence(tmp_path, number):
    path = tmp_path / "suite.yaml"
    long = HASTY | {"epochs": 100_000}
    path.write_text(yaml.safe_dump({"common": long, "victims": [{"poisoning_rate": 0}]}))
    with (tmp_path / "said").open("w") as log:
        made = subprocess.Popen(
            [sys.executable, "-m", "study.victims", str(path), "--out", str(tmp_path / "out")],
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            env=os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
            preexec_fn=lambda: [
                signal.signal(n, signal.SIG_DFL) for n in (signal.SIGHUP, signal.SIGINT)
            ],
        )
    try:
        deadline = time.monotonic() + 300
        while not any((tmp_path / "out").glob(".training-*/*")):
            assert made.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(made.pid, number)
        code = made.wait(60)
    finally:
        if made.poll() is None:
            os.killpg(made.pid, signal.SIGKILL)
            made.wait()
    said = " ".join((tmp_path / "said").read_text().split())
    assert code == 128 + number, said
    assert f"suite.yaml was ended by {signal.Signals(number).name}; launch it again" in said
    assert "Traceback" not in said
