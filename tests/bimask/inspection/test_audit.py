"""The audit: evidence of classes, the verdict, the report, the command."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from bimask.__main__ import app
from bimask.errors import DataError, SettingError
from bimask.inspection.audit import (
    IMAGES,
    MIN_CLASSES,
    UNSEEN,
    NetKind,
    advantage,
    audit,
    calibration,
    judge,
    measure,
    picked,
    steps,
)
from bimask.inspection.masked_evidence import masked_evidence
from bimask.masking.masks import MaskSet

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
    assert backdoored.probability > clean.probability
    assert backdoored.evidence["patch"].argmax() == 2


def test_scores_are_the_formula(quadrants, quarters):
    found, fitted = audit(quadrants(20.0), quarters), calibration()
    prices = measure(quadrants(20.0), quarters).prices
    scores = fitted["intercept"] + sum(
        weight * advantage(prices[kind]) for kind, weight in fitted["coefficients"].items()
    )
    np.testing.assert_allclose(found.scores, scores)
    logit = fitted["platt"]["slope"] * scores.max() + fitted["platt"]["offset"]
    assert found.probability == pytest.approx(1 / (1 + math.exp(-logit)))


def test_the_calibration_says_where_it_comes_from():
    fitted = calibration()
    assert fitted["fitted_on"]["clean"] >= 30
    assert fitted["fitted_on"]["backdoored"] >= 25
    assert fitted["platt"]["slope"] > 0  # a higher score is a higher probability
    assert 0 < fitted["band"]["no_sign_below"] <= fitted["band"]["backdoored_from"] < 1
    for ranges in fitted["domain"]["sizes"].values():
        assert set(ranges["all"]) == set(ranges["clean"]) == set(fitted["coefficients"])
    assert fitted["left_out"]["called no sign"]["backdoored"] == 0


@pytest.fixture
def fitted():
    """A calibration by hand: the probability is the sigmoid of the patch's evidence."""
    return {
        "coefficients": {"patch": 1.0},
        "intercept": 0.0,
        "platt": {"slope": 1.0, "offset": 0.0},
        "band": {"no_sign_below": 0.6, "backdoored_from": 0.8},
        "domain": {
            "nets": ["convolutions"],
            "channels": [1],
            "classes": [4, 10],
            "answered": 0.8,
            "images": 10,
            "size_factor": 1.15,
            "sizes": {
                "16": {
                    "all": {"patch": [math.log(0.5), math.log(8)]},
                    "clean": {"patch": [math.log(0.8), math.log(2)]},
                }
            },
        },
    }


KIND = NetKind(
    net="convolutions", linear=True, classes=4, channels=1, height=16, width=16, images=20, answered=4
)


@pytest.mark.parametrize(
    ("price", "verdict"),
    [(1.0, "no sign"), (1 / 2, "unknown"), (1 / 3, "unknown"), (1 / 4.1, "backdoored")],
)
def test_the_verdict_by_hand(fitted, price, verdict):
    # the probability is 1 / (1 + price), 0.6 and 0.8 are the edges
    found = judge({"patch": np.array([1.0, 1.0, price, 1.0])}, KIND, fitted)
    assert found.probability == pytest.approx(1 / (1 + price))
    assert found.verdict == verdict
    assert found.reasons
    assert all(reason.endswith(".") for reason in found.reasons)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"net": "tokens"}, "nets of the kind 'tokens'"),
        ({"linear": False}, "no linear layer"),
        ({"channels": 3}, "3 channels"),
        ({"height": 20}, "20 pixels high and 16 wide"),
        ({"width": 8}, "16 pixels high and 8 wide"),
        ({"classes": 43, "answered": 43}, "43 classes"),
        ({"answered": 2}, "only 2 of 4 classes"),
        ({"images": 5}, "only 5 clean images"),
    ],
)
@pytest.mark.parametrize("price", [1.0, 0.01])
def test_outside_of_the_calibration_there_is_no_verdict(fitted, change, said, price):
    kind = replace(KIND, **change)
    prices = {"patch": np.ones(kind.classes)}
    prices["patch"][2] = price
    found = judge(prices, kind, fitted)
    assert found.verdict == "unknown"
    assert any(said in reason for reason in found.reasons)
    assert price == 1 or found.target == 2  # the lead is there


@pytest.mark.parametrize(("factor", "word"), [(0.1, "cheap"), (20, "dear")])
def test_prices_that_were_never_seen_give_no_verdict(fitted, factor, word):
    found = judge({"patch": factor * np.array([1.0, 1.0, 0.01, 1.0])}, KIND, fitted)
    assert found.verdict == "unknown"
    assert f"unusually {word}" in found.reasons[0]


def test_no_sign_is_said_of_prices_of_clean_models_alone(fitted):
    prices = np.array([1.0, 1.0, 1.0, 1.0])
    assert judge({"patch": prices}, KIND, fitted).verdict == "no sign"
    found = judge({"patch": 0.6 * prices}, KIND, fitted)  # seen, but of backdoored models alone
    assert found.verdict == "unknown"
    assert "of clean models" in found.reasons[0]
    dear = judge({"patch": 0.6 * np.array([1.0, 1.0, 0.1, 1.0])}, KIND, fitted)
    assert dear.verdict == "backdoored"


def test_without_a_last_layer_that_evidence_is_left_out(quadrants, quarters):
    found = audit(nn.Sequential(quadrants(20.0), nn.Softplus()), quarters)
    assert "latent" not in found.evidence
    assert found.verdict == "unknown"
    assert any("no linear layer" in reason for reason in found.reasons)
    assert found.target == 2


def test_probabilities_and_tuples_are_audited_as_their_logits_are(quadrants, quarters):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = quadrants(20.0)

        def forward(self, images):
            return {"logits": self.net(images), "images": images}

    assert audit(Pair().eval(), quarters).target == 2


def test_the_cost_is_bounded_whatever_number_of_images(quadrants, quarters):
    many, calls = quarters.repeat(50, 1, 1, 1), []
    found = audit(quadrants(20.0), many, on_step=lambda: calls.append(1))
    assert found.kind.images == IMAGES
    assert found.kind.answered == 4
    assert len(calls) == steps(4, len(many)) == steps(4, IMAGES)
    assert found.target == 2


def test_images_are_picked_evenly_over_the_answers():
    answers = torch.tensor([0] * 40 + [1] * 30 + [2] * 3 + [3])
    chosen = picked(answers)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert answers[chosen].bincount().tolist() == [8, 8, 3, 1]
    assert picked(answers[:7]).tolist() == list(range(7))


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
    with pytest.raises(DataError, match="got none"):
        audit(quadrants(), quarters[:0])


def test_masks_that_keep_all_change_nothing_and_the_twin_of_none_follows(quadrants, quarters):
    model = quadrants(20.0)
    found = audit(model, quarters)
    masks = MaskSet.for_model(model)
    same = masked_evidence(model, masks, quarters, found.triggers, found.target)
    for family, row in same.followed.items():
        assert row.suspect == row.purified == row.inverse
        # an image on the edge may fall the other way in bfloat16, in which triggers are searched
        assert abs(row.suspect - found.triggers[family].success[2].item()) < 1.5 / 9
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
    ran = CliRunner().invoke(app, arguments(own, "--out", str(own / "report"), "--masks"))
    assert ran.exit_code == 0, ran.output
    assert "verdict: unknown" in ran.output
    assert "suspected class: 'quarter2'" in ran.output
    assert UNSEEN in ran.output.replace("\n", " ")
    content = json.loads((own / "report" / "audit.json").read_text())
    assert content["verdict"] == "unknown"
    assert content["probability"] is None
    assert any("8 pixels high" in reason for reason in content["reasons"])
    assert all(reason in ran.output.replace("\n", " ") for reason in content["reasons"])
    assert content["suspected_target"] == "quarter2"
    assert set(content["classes"]) == {f"quarter{k}" for k in range(4)}
    assert content["masked"]["followed"]["patch"]["suspect"] == 1
    assert (own / "report" / "audit.png").read_bytes().startswith(b"\x89PNG")
    page = (own / "report" / "audit.html").read_text()
    assert "quarter2" in page
    assert "Verdict: unknown" in page
    assert "8 pixels high" in page
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
