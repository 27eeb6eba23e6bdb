"""A model of the user's own becomes a victim in a study: a factory in a file, weights, pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file

from bimask import load_data, train_victim
from bimask.interop import save_imported
from bimask.victims import VictimSpec
from bimask.victims.imported import assemble

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]

FACTORY = """
from torch import nn


class Suspect(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        )
        self.head = nn.Linear(256, num_classes)

    def forward(self, x):
        return self.head(self.body(x))


def make(num_classes):
    return Suspect(num_classes)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What a user has, outside the project; the weights were trained by somebody else."""
    home = tmp_path_factory.mktemp("user")
    (home / "suspect.py").write_text(FACTORY)
    digits = load_data("digits", image_size=12)
    for split, most in (("train", 60), ("test", 20)):
        data = getattr(digits, split)
        for label in range(4):
            folder = home / "pictures" / split / str(label)
            folder.mkdir(parents=True)
            for row, picture in enumerate(data.images[data.labels == label][:most]):
                Image.fromarray(picture[0].numpy()).save(folder / f"{row}.png")
    model = train_victim(
        VictimSpec(
            dataset=f"imagefolder:{home / 'pictures'}",
            net=f"{home / 'suspect.py'}:make",
            epochs=12,
            batch_size=32,
        )
    ).model.net
    others = train_victim(VictimSpec(image_size=12, width=4, epochs=8))
    sets = others.eval_sets(digits, "test")
    imported = assemble(
        source="backdoorbench",
        net="small_resnet",
        weights=(others.model, 4),
        dataset="digits",
        clean=sets.clean,
        triggered=sets.triggered,
        clean_index=None,  # nobody says which images belong together: no picture, but scores
    )
    save_imported(imported, home / "somebodys", source=home / "suspect.py")
    save_file({key: v.contiguous() for key, v in model.state_dict().items()}, home / "w.safetensors")
    study = {
        "name": "own",
        "trials": 2,
        "paper_defaults": False,  # minutes of rounds that show nothing here
        "clean_images_per_class": 3,
        "victims": [
            {
                "dataset": "imagefolder:pictures",
                "net": "suspect.py:make",
                "weights": "w.safetensors",
                "attack": {"name": "badnets"},
            },
            {"imported": "somebodys"},
        ],
        "reference_point": {"clean_accuracy": 0.0, "attack_success": 1.0},
        "choose": {"max_accuracy_drop": 1.0},
        "fixed": {"inner_optimizer": "sign", "step_size": None, "patience": None}
        | {"initialise_rounds": 1, "minimise_rounds": 1, "select_rounds": 1, "inner_steps": 1},
        "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3}},
    }
    (home / "study.yaml").write_text(yaml.safe_dump(study))
    return home


def run(*words, cwd):
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"},
    )


def test_a_users_own_model_goes_through_a_study_and_is_purified(home):
    done = run("study.launch", "study.yaml", cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "given" in done.stdout
    summary = json.loads((home / "outputs" / "own" / "summary.json").read_text())
    assert summary["n_complete"] == 2
    assert list(summary["victims"]) == ["pictures-badnets", "somebodys"]
    for victim in summary["victims"].values():
        assert victim["test"]["attack_success"] > 0.5
        assert victim["val"]["split"] == "val"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("reuse: ")]
    words = line.removeprefix("reuse: python -m ").split()
    assert words[-1] == "--trust-code"

    done = run(*words, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    cleaned = home / "outputs" / "own" / "cleaned" / "model.safetensors"
    assert cleaned.is_file()
    picture = home / "outputs" / "own" / "victims" / "pictures-badnets.png"
    assert Image.open(picture).size[1] == 671
