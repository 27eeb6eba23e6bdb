"""`python -m study.victims`: a suite of victims made by Ray tasks."""

import os
import subprocess
import sys

import pytest
import torch
import yaml

from bimask.victims import VictimSpec, load_victim, train_victim

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
