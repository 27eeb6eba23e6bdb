"""`python -m bimask`: a victim is trained, then purified with a configuration of a study."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from bimask import MaskSet, load_victim, masked_forward
from bimask.__main__ import app
from bimask.errors import BimaskError

SPEC = {
    "dataset": "digits",
    "image_size": 12,
    "net": "small_resnet",
    "width": 4,
    "attack": {"name": "badnets"},
    "epochs": 6,
}
BEST = {
    "purify": {
        "inner_optimizer": "sign",
        "step_size": None,
        "patience": None,
        "initialise_rounds": 3,
        "minimise_rounds": 3,
        "select_rounds": 3,
        "inner_steps": 2,
        "initial_mask": 0.6,  # few rounds from 1 leave masks that do nothing, on some CPUs
        "initial_selection": 0.8,
        "mask_lr": 0.1,
    },
    "seed": 0,
    "study": "x",
    "trial": 1,
}


def command(*words, cwd):
    return subprocess.run(
        [sys.executable, "-m", "bimask", *map(str, words)], capture_output=True, text=True, cwd=cwd
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    (folder / "best.yaml").write_text(yaml.safe_dump(BEST))
    words = [str(folder / "spec.yaml"), "--out", str(folder / "victims")]
    done = CliRunner().invoke(app, ["train-victim", *words])
    assert done.exit_code == 0, done.output
    (victim,) = (folder / "victims").iterdir()
    done = command(
        "purify", "--victim", victim, "--config", "best.yaml", "--out", "cleaned", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert "before" in done.stdout
    assert "after" in done.stdout
    return folder


def test_the_cleaned_model_is_plain_and_answers_as_the_masked_victim(folder):
    (path,) = (folder / "victims").iterdir()
    victim = load_victim(path)
    weights = load_file(folder / "cleaned" / "model.safetensors")
    assert set(weights) == set(victim.model.state_dict())
    masks = MaskSet.from_tensors(load_file(folder / "cleaned" / "masks.safetensors"), sharpness=20)
    images = victim.spec.load_data().test.floats(slice(0, 64))
    expected = masked_forward(victim.model, masks, images)
    before = victim.model(images)
    victim.model.load_state_dict(weights, strict=True)
    torch.testing.assert_close(victim.model(images), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3), "the masks did nothing"
    manifest = json.loads((folder / "cleaned" / "manifest.json").read_text())
    assert manifest["after"]["split"] == "test"
    assert manifest["purify"]["mask_lr"] == 0.1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("--victim", "no", "--config", "best.yaml", "--out", "new"),
            "no is no folder; give a victim's",
        ),
        (
            ("--victim", "VICTIM", "--config", "no.yaml", "--out", "new"),
            "Cannot read the configuration",
        ),
        (("--victim", "VICTIM", "--config", "best.yaml", "--out", "cleaned"), "exists"),
        (("--victim", "VICTIM", "--config", "spec.yaml", "--out", "new"), "attack"),
    ],
)
def test_bad_input_gets_a_sentence(folder, monkeypatch, words, expected):
    (victim,) = (folder / "victims").iterdir()
    monkeypatch.chdir(folder)
    words = [str(victim) if word == "VICTIM" else word for word in words]
    done = CliRunner().invoke(app, ["purify", *words])
    assert isinstance(done.exception, BimaskError)
    assert expected in str(done.exception)
    assert not (folder / "new").exists()
