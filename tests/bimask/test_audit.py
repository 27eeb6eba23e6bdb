"""The audit: evidence of classes, the verdict, the report, the command."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from bimask.__main__ import app
from bimask.audit import MIN_CLASSES, advantage, audit, calibration, prices_of, steps
from bimask.errors import DataError, SettingError
from bimask.masked_evidence import masked_evidence
from bimask.masks import MaskSet

FACTORY = """
import torch
from torch import nn
from torch.nn import functional as F

class Quadrants(nn.Module):
    def __init__(self, backdoor=0.0):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 4, 4, bias=False)
        self.last = nn.Linear(17, 4, bias=False)
        self.conv.weight.data.fill_(1 / 16)
        self.last.weight.data.zero_()
        self.last.weight.data[:, :4] = 12 * torch.eye(4)
        self.last.weight.data[2, 4] = backdoor

    def forward(self, images):
        quarters = F.relu(self.conv(images))[:, 0].flatten(1)
        sign = images[:, :, 0, 0] - images[:, :, 0, 1]
        return self.last(torch.cat([quarters, sign, 0 * quarters, 0 * quarters, 0 * quarters], 1))

def make():
    return Quadrants()
"""


@pytest.fixture
def quadrants():
    """Strength of a backdoor towards class 2 -> a model of four classes, the brightest quarter."""
    names = {}
    exec(FACTORY, names)
    return lambda backdoor=0.0: names["Quadrants"](backdoor).eval()


@pytest.fixture
def quarters():
    """Three faint-noised images of each class, (12, 1, 8, 8)."""
    images = 0.2 * torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[:, :, 0, :2] = 0.1
    for i in range(12):
        row, column = divmod(i // 3, 2)
        images[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.6
    return images


def test_advantage_by_hand():
    found = advantage(np.array([1.0, 4.0, 8.0, 2.0]))
    # the median of logs of the others: of (4, 8, 2) it is log 4, of (1, 8, 2) log 2, ...
    np.testing.assert_allclose(found, np.log([4, 2 / 4, 2 / 8, 4 / 2]))


def test_advantage_has_no_unit_and_bears_what_cannot_be_reached():
    prices = np.array([0.3, 2.0, 1.0, 0.9, 1.1])
    np.testing.assert_allclose(advantage(prices), advantage(7 * prices))
    found = advantage(np.array([0.3, math.inf, 1.0, 0.9, 1.1]))
    assert np.isfinite(found).all()
    assert found.argmin() == 1
    assert found.argmax() == 0


def test_a_planted_backdoor_raises_probability_and_is_named(quadrants, quarters):
    clean, backdoored = audit(quadrants(), quarters), audit(quadrants(20.0), quarters)
    assert backdoored.target == 2
    assert backdoored.flagged
    assert backdoored.probability > clean.probability
    assert not clean.flagged
    assert backdoored.evidence["patch"].argmax() == 2


def test_the_verdict_is_the_formula(quadrants, quarters):
    found, fitted = audit(quadrants(20.0), quarters), calibration()
    prices, _ = prices_of(quadrants(20.0), quarters)
    scores = fitted["intercept"] + sum(
        weight * advantage(prices[kind]) for kind, weight in fitted["coefficients"].items()
    )
    np.testing.assert_allclose(found.scores, scores)
    logit = fitted["platt"]["slope"] * scores.max() + fitted["platt"]["offset"]
    assert found.probability == pytest.approx(1 / (1 + math.exp(-logit)))


def test_the_calibration_says_where_it_comes_from():
    fitted = calibration()
    assert fitted["fitted_on"]["clean"] == fitted["fitted_on"]["backdoored"] == 20
    assert len(fitted["fitted_on"]["attacks"]) == 5
    assert fitted["platt"]["slope"] > 0  # a higher score is a higher probability
    assert sum(row["n"] for row in fitted["left_out"]["reliability"]) == 40


def test_steps_are_told_and_nothing_is_changed(quadrants, quarters):
    model, calls = quadrants(20.0), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    audit(model, quarters, on_step=lambda: calls.append(1))
    assert len(calls) == steps(4, 12)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_cannot_be_audited_is_refused(quadrants, quarters):
    with pytest.raises(DataError, match="all 3 clean images the class 0"):
        audit(quadrants(), quarters[:3])
    few = nn.Sequential(nn.Flatten(), nn.Linear(64, MIN_CLASSES - 1))
    with pytest.raises(DataError, match="too few"):
        audit(few, quarters)
    with pytest.raises(SettingError, match=r"nn\.Linear"):
        audit(nn.Sequential(quadrants(), nn.Softmax(1)), quarters)


def test_masks_that_keep_all_change_nothing_and_the_twin_of_none_follows(quadrants, quarters):
    model = quadrants(20.0)
    found = audit(model, quarters)
    masks = MaskSet.for_model(model)
    same = masked_evidence(model, masks, quarters, found.triggers, found.target)
    for family, row in same.followed.items():
        assert row.suspect == row.purified == row.inverse == found.triggers[family].success[2].item()
    assert same.agreement == same.inverse_agreement == 1
    with torch.no_grad():  # every channel goes to the twin
        masks.mask.zero_()
        masks.selection.zero_()
    apart = masked_evidence(model, masks, quarters, found.triggers, found.target)
    assert all(row.inverse == row.suspect for row in apart.followed.values())
    assert any(row.purified != row.suspect for row in apart.followed.values())


@pytest.fixture
def own(tmp_path, quadrants, quarters):
    """A user's files: factory, weights, pictures in class folders."""
    from PIL import Image

    (tmp_path / "mine.py").write_text(FACTORY)
    save_file(quadrants(20.0).state_dict(), tmp_path / "w.safetensors")
    for i, image in enumerate(quarters):
        home = tmp_path / "clean" / f"quarter{i // 3}"
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).byte().numpy()).save(home / f"{i}.png")
    return tmp_path


def arguments(home, *more):
    own = ["--model", str(home / "w.safetensors"), "--net", f"{home / 'mine.py'}:make"]
    return ["audit", *own, "--clean", str(home / "clean"), "--channels", "1", *more]


def test_the_command_writes_verdict_pictures_and_page(own):
    ran = CliRunner().invoke(app, arguments(own, "--out", str(own / "report")))
    assert ran.exit_code == 0, ran.output
    assert "towards class 'quarter2'" in ran.output
    content = json.loads((own / "report" / "audit.json").read_text())
    assert content["backdoored"]
    assert content["suspected_target"] == "quarter2"
    assert set(content["classes"]) == {f"quarter{k}" for k in range(4)}
    assert content["masked"]["followed"]["patch"]["suspect"] == 1
    assert (own / "report" / "audit.png").read_bytes().startswith(b"\x89PNG")
    page = (own / "report" / "audit.html").read_text()
    assert "quarter2" in page
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched


def test_a_folder_that_exists_is_left_alone(own):
    (own / "report").mkdir()
    ran = CliRunner().invoke(app, arguments(own, "--out", str(own / "report"), "--no-masks"))
    assert isinstance(ran.exception, SettingError)
    assert not list((own / "report").iterdir())


def test_half_a_model_is_refused(own):
    ran = CliRunner().invoke(app, ["audit", "--model", str(own / "w.safetensors")])
    assert isinstance(ran.exception, SettingError)
    assert "--victim" in str(ran.exception)
