"""A study on a model whose trigger nobody knows: there are weights, a factory and clean pictures."""

import hashlib
import io
import json
import os
import runpy
import sqlite3
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from bimask import ImageData, VictimSpec, load_data, train_victim
from bimask.errors import BimaskError, DataError, VictimError, VictimRefusedError
from bimask.metrics import CleanScores, CleanSet, evaluate, predict
from study.analysis.blind import PROMISE
from study.promotion.candidate import read_candidate
from study.report import write_report
from study.search.warm_start import read_earlier
from study.spec.config import StudyError
from study.spec.reading import load_config
from study.spec.suspect import shared_out

FACTORY = """
from torch import nn


def make(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, num_classes),
    )


def softened(num_classes):
    return make(num_classes).append(nn.Softmax(1))
"""
POINT = {"clean_accuracy": 0.0, "recovery": 0.0}
CLASSES, PICTURES, FOR_DEFENCE = 4, 13, 4
STUDY = {
    "name": "doubt",
    "trials": 3,
    "report_every": 2,
    "clean_images_per_class": FOR_DEFENCE,
    "suspect": {"model": "weights.safetensors", "net": "net.py:make", "clean": "pictures"}
    | {"image_size": 12, "mean": [0.5, 0.5, 0.5], "std": [0.4, 0.4, 0.4]},
    "selection": "blind",
    "reference_point": {"clean_accuracy": 0.0},
    "choose": {"max_accuracy_drop": 1.0},
    "fixed": {"inner_optimizer": "sign", "step_size": None, "patience": None}
    | {"initialise_rounds": 4, "minimise_rounds": 6, "select_rounds": 4, "inner_steps": 2},
    "paper_defaults": False,
    "space": {"mask_lr": {"kind": "float", "low": 0.1, "high": 0.5}},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory, with_store):
    """What a user has, outside the project. The model has a backdoor, but nothing here says which."""
    home = tmp_path_factory.mktemp("user")
    with_store(home / "outputs")
    (home / "net.py").write_text(FACTORY)
    digits = load_data("digits", image_size=12)
    for split, most in (("train", 60), ("test", PICTURES)):
        data = getattr(digits, split)
        for label in range(CLASSES):
            folder = home / ("pictures" if split == "test" else "theirs") / str(label)
            folder.mkdir(parents=True)
            for row, picture in enumerate(data.images[data.labels == label][:most]):
                Image.fromarray(picture[0].numpy()).save(folder / f"{row}.png")
    theirs = VictimSpec(
        dataset=f"imagefolder:{home / 'theirs'}",
        net=f"{home / 'net.py'}:make",
        normalise={"mean": [0.5] * 3, "std": [0.4] * 3},
        epochs=12,
        batch_size=32,
    )
    state = train_victim(theirs).model.net.state_dict()
    save_file({key: v.contiguous() for key, v in state.items()}, home / "weights.safetensors")
    (home / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return home


def run(module, *words, cwd):
    """`python -m` in this process, which has imported everything: what it says."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.chdir(cwd)
        patch.setenv("RAY_ADDRESS", "local")
        patch.setattr(sys, "argv", [module, *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
    assert not ended.value.code, said.getvalue()
    return said.getvalue()


@pytest.fixture(scope="module")
def launched(home):
    said = run("study.launch", "study.yaml", "--concurrency", "1", cwd=home)
    return home / "outputs" / "doubt", said


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def keys_of(value):
    """Every key anywhere in JSON."""
    if isinstance(value, dict):
        return set(value) | {key for inner in value.values() for key in keys_of(inner)}
    return {key for inner in value for key in keys_of(inner)} if isinstance(value, list) else set()


# --- the study ---


@pytest.mark.ray
def test_a_suspect_is_searched_and_chosen_by_accuracy_and_risk_alone(launched):
    folder, _ = launched
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    assert [trial["status"] for trial in trials] == ["COMPLETE"] * 3
    assert summary["objectives"] == {"clean_accuracy": "maximize", "risk": "minimize"}
    chosen = min(trials, key=lambda t: (t["risk"], -t["clean_accuracy"], t["number"]))
    assert summary["chosen"]["number"] == summary["selection"]["blind"]["number"] == chosen["number"]
    assert set(summary["chosen"]["test"]) == {"clean_accuracy"}
    assert len({trial["risk"] for trial in trials}) > 1, "nothing to choose between"
    kept_back = CLASSES * (PICTURES - FOR_DEFENCE)
    before = summary["victims"]["suspect"]
    assert (before["val"]["n_clean"], before["test"]["n_clean"]) == (20, 16)
    assert before["val"]["n_clean"] + before["test"]["n_clean"] == kept_back
    reports = [json.loads(line) for line in (folder / "reports.jsonl").read_text().splitlines()]
    assert {report["step"] for report in reports} >= {1}
    for found in (trials, summary, reports):
        assert not keys_of(found) & {"attack_success", "recovery", "n_triggered", "der", "rdr"}


@pytest.mark.ray
def test_mlflow_has_no_column_for_what_nobody_knows(launched):
    folder, _ = launched
    with sqlite3.connect(folder.parent / "mlflow.db") as store:
        names = {name for (name,) in store.execute("select distinct key from metrics")}
        states = store.execute("select status, count(*) from runs group by status").fetchall()
    assert states == [("FINISHED", 4)]
    assert {"clean_accuracy", "risk", "suspect/clean_accuracy", "chosen/risk"} <= names
    assert "chosen/test/clean_accuracy" in names
    assert not [name for name in names if "attack_success" in name or "recovery" in name]


@pytest.mark.ray
def test_page_and_console_say_what_this_can_and_cannot_promise(launched, browser):
    folder, said = launched
    assert " ".join(PROMISE.split()) in " ".join(said.split())
    assert "held-back pictures" in said
    assert "ASR" not in said
    page, complaints = browser.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(write_report(folder, folder.parent / "victims").as_uri())
    assert PROMISE in page.locator("#finding").inner_text()
    assert "of the short cuts found in the suspect" in page.locator("h1").inner_text()
    text = page.locator("main").inner_text()
    for word in ("attack success", "ASR", "NaN", "undefined", "recovery"):
        assert word not in text.replace(PROMISE, ""), word
    assert "risk on val, % (lower is better)" in page.locator("#front").text_content()
    assert page.locator(".point").count() == 3
    assert page.locator(".layers").count() == 1
    assert page.locator("#blind").count() == page.locator("#heat").count() == 0
    page.close()
    assert complaints == []


@pytest.mark.ray
def test_the_choice_purifies_the_suspect_and_is_not_promoted(launched, at_home):
    folder, said = launched
    (line,) = [line for line in said.splitlines() if line.startswith("reuse: ")]
    run(*line.removeprefix("reuse: python -m ").split(), cwd=at_home)
    assert (folder / "cleaned" / "model.safetensors").is_file()
    with pytest.raises(StudyError, match="whose attack success nobody can measure"):
        read_candidate("doubt", folder.parent, None)


@pytest.mark.ray
def test_another_study_of_the_suspect_takes_the_trials_over(launched, at_home):
    folder, _ = launched
    path = at_home / "again.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"warm_start_from": [str(folder)]}))
    assert len(read_earlier(load_config(path)).observed) == 3
    path.write_text(yaml.safe_dump(STUDY | {"warm_start_from": [str(folder)], "seed": 1}))
    other = read_earlier(load_config(path))
    assert other.observed == []
    assert 1 <= len(other.points) <= 3


# --- the file ---


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"selection": "oracle"}, "selection: oracle needs a known trigger"),
        ({"victims": [{"dataset": "digits"}]}, "victims: needs a known trigger"),
        ({"held_out": [{"dataset": "digits"}]}, "held_out: needs a known trigger"),
        ({"controls": [{"poisoning_rate": 0}]}, "controls: needs a known trigger"),
        ({"confirm": {"seeds": 2}}, "confirm: needs a known trigger"),
        ({"gates": {"attack_success": 0.1}}, "gates: needs a known trigger"),
        (
            {"objectives": ["risk", "recovery"], "reference_point": POINT},
            "needs the true trigger; use risk",
        ),
        ({"constraints": {"max_attack_success": 0.1}}, "needs the true trigger; use risk"),
        ({"suspect": None, "victims": []}, "victims: is empty; list one victim or more, or give a"),
        ({"suspect": {**STUDY["suspect"], "model": "no.pt"}}, "suspect: cannot read no.pt"),
        ({"suspect": {**STUDY["suspect"], "clean": "no"}}, "suspect: there is no folder no;"),
        ({"suspect": {**STUDY["suspect"], "net": "no"}}, "'no'"),
        ({"suspect": {**STUDY["suspect"], "std": None}}, "a mean needs a standard deviation"),
    ],
)
def test_what_cannot_stand_beside_a_suspect_is_one_sentence(at_home, change, expected):
    path = at_home / "bad.yaml"
    path.write_text(yaml.safe_dump(STUDY | change))
    with pytest.raises(StudyError) as refused:
        load_config(path)
    (line,) = [line for line in str(refused.value).splitlines() if expected in line]
    assert line.startswith(f"{path}")


def test_a_suspect_goes_without_saying_blind(at_home):
    path = at_home / "short.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in STUDY.items() if k != "selection"}))
    config = load_config(path)
    path.write_text(yaml.safe_dump(config.model_dump()))
    assert load_config(path).digest == config.digest, "it could not be gone on with"
    assert (config.selection, config.objectives) == ("blind", ["clean_accuracy", "risk"])
    assert config.victim_names() == ["suspect"]


def test_a_study_without_a_suspect_keeps_its_digest(tmp_path):
    path = tmp_path / "plain.yaml"
    point = {"clean_accuracy": 0.5, "attack_success": 1.0}
    plain = {"name": "plain", "trials": 3, "victims": [{}], "reference_point": point, "sampler": "tpe"}
    path.write_text(yaml.safe_dump(plain | {"space": STUDY["space"]}))
    assert load_config(path).digest == "9bd59d178c48edbe", "which it had before there were suspects"


# --- the pictures ---


def test_files_count_by_their_content(at_home):
    spec = load_config(at_home / "study.yaml").suspect
    os.utime(at_home / "pictures" / "0" / "0.png")
    assert load_config(at_home / "study.yaml").suspect.digest == spec.digest
    picture = at_home / "pictures" / "3" / "0.png"
    content = picture.read_bytes()
    try:
        Image.new("L", (12, 12)).save(picture)
        with pytest.raises(VictimError, match="changed since the study began"):
            spec.load(FOR_DEFENCE)
        assert load_config(at_home / "study.yaml").suspect.digest != spec.digest
    finally:
        picture.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        ({"mean": [9.0] * 3}, VictimRefusedError, "order of the class folders"),
        ({"clean": "pictures/0"}, DataError, "in no class folders"),
    ],
)
def test_a_suspect_that_cannot_be_measured_is_refused(at_home, change, error, expected):
    path = at_home / "odd.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"suspect": STUDY["suspect"] | change}))
    with pytest.raises(error, match=expected):
        load_config(path).suspect.load(FOR_DEFENCE)
    assert issubclass(error, BimaskError)


def test_a_suspect_that_answers_with_probabilities_is_stepped_into(at_home):
    plain = load_config(at_home / "study.yaml").suspect.load(FOR_DEFENCE)
    path = at_home / "soft.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"suspect": STUDY["suspect"] | {"net": "net.py:softened"}}))
    soft = load_config(path).suspect.load(FOR_DEFENCE)
    assert any("Softmax" in note for note in soft.notes)
    images = soft.load_data().val.floats()
    assert torch.equal(soft.model(images), plain.model(images))


def test_pictures_may_be_oblong(at_home):
    spec = load_config(at_home / "study.yaml").suspect
    assert spec.image_size == 12
    path = at_home / "oblong.yaml"
    for given, size in (([12, 20], (12, 20)), ([12, 12], 12)):
        path.write_text(yaml.safe_dump(STUDY | {"suspect": STUDY["suspect"] | {"image_size": given}}))
        oblong = load_config(path).suspect
        assert oblong.image_size == size
        assert type(oblong).model_validate_json(oblong.model_dump_json()) == oblong
        assert (oblong.digest == spec.digest) == (size == 12)
    oblong = spec.model_copy(update={"image_size": (12, 20)})
    assert "--image-size 12x20" in oblong.options
    assert oblong.load_data(FOR_DEFENCE).val.images.shape[1:] == (3, 12, 20)
    assert oblong.load(FOR_DEFENCE).scores["val"].clean_accuracy > 0.2


@pytest.mark.parametrize("given", ["12", 3, [12], [12, 2000], [12, 12, 3], 12.5, True])
def test_a_size_that_is_none_is_one_sentence(at_home, given):
    path = at_home / "odd.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"suspect": STUDY["suspect"] | {"image_size": given}}))
    with pytest.raises(
        StudyError, match="must be one number of pixels or .height, width.*got"
    ) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert "suspect.image_size" in str(caught.value)


def some_data(counts):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (sum(counts), 1, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return ImageData(images, labels, tuple("abcdef"[: len(counts)]))


def rows(data):
    return {hashlib.sha256(image.numpy().tobytes()).digest() for image in data.images}


def test_pictures_are_on_one_side_whatever_their_order():
    data = some_data([9, 6])
    twice = ImageData(data.images.repeat(2, 1, 1, 1), data.labels.repeat(2), data.classes)
    splits, again = shared_out(data, 3), shared_out(twice.subset(torch.randperm(30)), 3)
    parts = [rows(part) for part in parts_of(splits)]
    assert [len(part) for part in parts] == [6, 5, 4]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 15
    assert parts == [rows(part) for part in parts_of(again)]
    for part in parts_of(splits):
        assert set(part.labels.tolist()) == {0, 1}


def parts_of(splits):
    return splits.train, splits.val, splits.test


def test_too_few_pictures_are_counted():
    with pytest.raises(DataError, match=r"Class 'b' has 4 distinct clean pictures, but 3 are"):
        shared_out(some_data([9, 4]), 3)


# --- scores ---


def test_clean_scores_count_right_answers_and_know_no_more():
    data = some_data([5, 3])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)).eval()
    got = evaluate(model, CleanSet(data, "val"))
    right = int((predict(model, data.images) == data.labels).sum())
    assert got == CleanScores(right / 8, 8, "val")
    assert set(asdict(got)) == {"clean_accuracy", "n_clean", "split"}
    assert CleanScores(0.6, 8, "val").arr(CleanScores(0.8, 8, "val")) == pytest.approx(0.25)
    with pytest.raises(DataError, match="none in split 'test'"):
        evaluate(model, CleanSet(data.subset(torch.tensor([], dtype=torch.long)), "test"))


@pytest.mark.slow
@pytest.mark.ray
def test_a_suspects_study_may_choose_the_defence(home):
    content = {key: value for key, value in STUDY.items() if key not in ("fixed", "space")}
    content |= {"name": "which", "trials": 4, "defences": ["clp", "ft_sam"]}
    content["fixed"] = {"ft_sam": {"epochs": 3}}
    (home / "which.yaml").write_text(yaml.safe_dump(content))
    done = run("study.launch", "which.yaml", "--concurrency", "1", cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = home / "outputs" / "which"
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [trial["parameters"]["defence"] for trial in trials[:2]] == ["clp", "ft_sam"]
    chosen = min(trials, key=lambda t: (t["risk"], -t["clean_accuracy"], t["number"]))
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert (best["trial"], best["defence"]) == (chosen["number"], chosen["parameters"]["defence"])
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("reuse: ")]
    done = run(*line.removeprefix("reuse: python -m ").split(), cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "cleaned" / "manifest.json").read_text())["defence"] == best["defence"]
