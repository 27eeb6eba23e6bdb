"""A stranger's net through the commands: what was done about it is told, nothing is done in silence."""

import json

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from bimask.__main__ import app
from bimask.cleaned.folder import load_cleaned
from bimask.defences.ims.config import PurifyConfig
from bimask.errors import DataError
from bimask.inspection.held_back import held_back_evidence
from bimask.inspection.suspect import CleanImages, hold_back, load_suspect
from bimask.masking.discovery import masks_for
from bimask.masking.masks import fold

CLASSES, PER_CLASS = 4, 6
FACTORY = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.fc1 = nn.Linear(6 * 25, 16)
        self.fc2 = nn.Sequential(nn.Linear(16, num_classes), nn.Softmax(dim=1))

    def forward(self, x):
        x.sub_(0.5)
        x = nn.functional.max_pool2d(self.conv(x).relu(), 2)
        return x, self.fc2(self.fc1(x.view(x.size(0), -1)).relu())

def make(num_classes):
    return Net(num_classes)

def wide(num_classes):
    return Net(num_classes + 1)
"""
SHORT = {
    "profile": "fast",
    "sites": "all",
    "initialise_rounds": 2,
    "minimise_rounds": 2,
    "select_rounds": 4,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A trained net, its weights and clean pictures, as a stranger brings them."""
    home = tmp_path_factory.mktemp("stranger")
    (home / "net.py").write_text(FACTORY)
    generator = torch.Generator().manual_seed(0)
    for label in range(CLASSES):
        (home / "clean" / f"c{label}").mkdir(parents=True)
        for row in range(PER_CLASS):
            image = picture(label, generator)
            Image.fromarray((image[0] * 255).byte().numpy()).save(
                home / "clean" / f"c{label}" / f"{row}.png"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        namespace = {}
        exec(FACTORY, namespace)
        net = namespace["make"](CLASSES)
        adam = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(60):
            labels = torch.arange(32) % CLASSES
            images = torch.stack([picture(int(label), generator) for label in labels])
            loss = nn.functional.nll_loss(net(images.clone())[1].log(), labels)
            adam.zero_grad()
            loss.backward()
            adam.step()
    save_file(net.state_dict(), home / "w.safetensors")
    (home / "short.yaml").write_text(yaml.safe_dump(SHORT))
    (home / "still.yaml").write_text(
        yaml.safe_dump(SHORT | {"initial_selection": 1.0, "mask_lr": 1e-12})
    )
    return home


def picture(label, generator):
    """The class is the bright quarter; (1, 12, 12) in [0, 1]."""
    image = 0.3 * torch.rand(1, 12, 12, generator=generator)
    row, column = divmod(label, 2)
    image[:, 6 * row : 6 * row + 6, 6 * column : 6 * column + 6] += 0.6
    return image


def run(home, command, *words, net="make"):
    own = [
        "--model",
        home / "w.safetensors",
        "--net",
        f"{home / 'net.py'}:{net}",
        "--clean",
        home / "clean",
    ]
    return CliRunner().invoke(app, [command, *map(str, own), *map(str, words)])


def test_what_was_done_about_the_model_is_told_and_the_cleaned_one_answers_with_logits(home, tmp_path):
    out = tmp_path / "out"
    done = run(home, "purify", "--config", home / "short.yaml", "--out", out)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "entry 1 is taken as the logits" in said
    assert "ends in Softmax" in said
    assert "of the sites are masked" in said
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["coverage"]["parameters"] > 0.9
    assert manifest["door"]["take"] == 1
    assert manifest["door"]["bypass"] == ["net.fc2.1"]
    cleaned = load_cleaned(out, own_code=True).model
    images = torch.rand(3, 1, 12, 12)
    kept = images.clone()
    logits = cleaned(images)
    assert torch.equal(images, kept)
    assert logits.shape == (3, CLASSES)
    assert not torch.allclose(logits.sum(1), torch.ones(3), atol=1e-3)
    assert set(load_file(out / "model.safetensors")) == set(load_file(home / "w.safetensors"))


def test_risk_and_accuracy_are_measured_on_pictures_held_back(home, tmp_path):
    done = run(
        home, "purify", "--config", home / "short.yaml", "--out", tmp_path / "a", "--held-back", 0.5
    )
    assert done.exit_code == 0, done.output
    assert "on pictures held back" in done.output
    held = json.loads((tmp_path / "a" / "manifest.json").read_text())["held_back"]
    assert held["images"] == CLASSES * PER_CLASS // 2
    assert 0 <= held["risk"] <= 1
    done = run(
        home, "purify", "--config", home / "short.yaml", "--out", tmp_path / "b", "--held-back", 0
    )
    assert "risk was not measured" in " ".join(done.output.split())


def test_a_purification_that_changes_nothing_says_so_and_writes_nothing(home, tmp_path):
    done = run(home, "purify", "--config", home / "still.yaml", "--out", tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert "nothing changed" in done.output
    assert not (tmp_path / "out").exists()


def test_the_sites_of_a_model_are_listed(home):
    done = run(home, "sites")
    assert done.exit_code == 0, done.output
    assert all(name in done.output for name in ("net.conv", "net.fc1@features", "features", "linear"))
    done = run(home, "sites", "--sites", "cov")
    assert done.exit_code != 0
    assert "did you mean conv" in str(done.exception)


def test_logits_that_are_not_the_classes_are_refused(home, tmp_path):
    done = run(home, "purify", "--config", home / "short.yaml", "--out", tmp_path / "out", net="wide")
    assert done.exit_code != 0
    assert not (tmp_path / "out").exists()


def test_without_a_configuration_the_profile_robust_is_used(home, tmp_path):
    done = run(home, "purify", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["purify"]
    assert PurifyConfig.model_validate(settings) == PurifyConfig.profile("robust")
    assert settings == PurifyConfig(profile="robust").model_dump(mode="json")


def test_pictures_are_held_back_by_their_pixels_evenly(home):
    suspect = load_suspect(home / "w.safetensors", f"{home / 'net.py'}:make", home / "clean")
    answers = suspect.clean.labels
    learned, held = hold_back(suspect.clean, answers, 0.34)
    assert held.labels.bincount().tolist() == [2] * CLASSES
    assert len(learned.images) + len(held.images) == CLASSES * PER_CLASS
    order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(1))
    again, _ = hold_back(suspect.clean.subset(order), answers[order], 0.34)
    assert {i.numpy().tobytes() for i in again.images} == {i.numpy().tobytes() for i in learned.images}


def test_an_unmasked_suspect_has_a_risk_of_one_and_few_pictures_have_none(home):
    suspect = load_suspect(home / "w.safetensors", f"{home / 'net.py'}:make", home / "clean")
    masks = masks_for(suspect.model, suspect.clean.floats(), "all")
    seen = held_back_evidence(suspect.model, fold(suspect.model, masks), suspect.clean)
    assert seen.risk == pytest.approx(1)
    assert seen.agreement == 1
    few = suspect.clean.subset(torch.arange(3))
    assert held_back_evidence(suspect.model, fold(suspect.model, masks), few) is None


def test_a_probe_that_cannot_be_made_gives_no_risk_and_says_why(home, monkeypatch):
    def refused(*_words, **_options):
        raise DataError("The suspect answers all alike.")

    monkeypatch.setattr("bimask.inspection.held_back.RiskProbe", refused)
    suspect = load_suspect(home / "w.safetensors", f"{home / 'net.py'}:make", home / "clean")
    masks = masks_for(suspect.model, suspect.clean.floats(), "all")
    seen = held_back_evidence(
        suspect.model, fold(suspect.model, masks), CleanImages(suspect.clean.images, None)
    )
    assert seen.risk is None
    assert "answers all alike" in seen.reason
    assert seen.accuracy_after is None
