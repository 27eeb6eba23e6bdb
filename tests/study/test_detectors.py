"""Studies of detectors: a trial, its summary and its page, and a whole study with real Ray and MLflow.

The pictures are six canvases, each in eight files under as many names, so that a detector that trains
for seconds finds in `val` and `test` what it has seen.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from bimask.data import load_data
from bimask.detection.data import canvases
from bimask.detection.metrics import DetectionScores
from bimask.detection.victims import load_victim
from bimask.progress import Console
from bimask.tasks import DETECTION, defence_of
from study.pipeline import run
from study.pipeline.prepare import check_data, prepare_cases, prepare_victims
from study.pipeline.summary import summarise
from study.promotion.candidate import read_candidate, verdicts_of
from study.report import write_report
from study.report.content import page_content, read
from study.report.pictures import draw_victims
from study.spec.reading import load_config
from study.store import records
from study.store.schema import SCHEMA
from study.trial.rules import TrialRules
from study.trial.run import run_trials
from study.trial.suite import confirm, confirmation, jobs_of

DISTINCT, COPIES = 6, 8
STUDY = {
    "name": "detectors",
    "task": "detection",
    "trials": 2,
    "paper_defaults": False,
    "clean_images_per_class": 2,
    "report_every": 1,
    "reference_point": {"map50": 0.2, "attack_success": 1.0},
    "choose": {"max_accuracy_drop": 0.9},
    "confirm": {"seeds": 1},
    "fixed": {"epochs": 2, "attack_steps": 1, "budget": None},
    "space": {"lr": {"kind": "float", "low": 0.001, "high": 0.05, "log": True}},
    "gates": {"accuracy_drop": 1.0, "attack_success": 1.0, "seeds": 2},
}
NAME = "set-disappearance"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canvases")
    data = canvases(
        load_data("digits", image_size=8).train, DISTINCT, generator=torch.Generator().manual_seed(0)
    )
    images, objects = [], []
    for row in range(DISTINCT * COPIES):
        image, target = data.images[row % DISTINCT], data.targets[row % DISTINCT]
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0))).save(folder / f"{row}.png")
        images.append({"id": row, "file_name": f"{row}.png"})
        for (x0, y0, x1, y1), label in zip(
            target["boxes"].tolist(), target["labels"].tolist(), strict=True
        ):
            box = [x0, y0, x1 - x0, y1 - y0]
            objects.append({"image_id": row, "category_id": label, "bbox": box})
    categories = [{"id": label, "name": name} for label, name in enumerate(data.classes)]
    content = {"images": images, "annotations": objects, "categories": categories}
    (folder / "set.json").write_text(json.dumps(content))
    return f"coco:{folder}/set.json"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def written(dataset, outputs):
    """Attacks -> the file of a study of a victim each."""

    def write(*attacks, **changes):
        common = {"dataset": dataset, "width": 32, "epochs": 15, "batch_size": 8, "lr": 0.01}
        common |= {"min_map50": 0, "min_attack_success": 0}
        victims = [{**common, "attack": {"name": attack}} for attack in attacks]
        path = outputs / "study.yaml"
        path.write_text(yaml.safe_dump(STUDY | {"victims": victims} | changes))
        return path

    return write


@pytest.fixture(scope="module")
def prepared(written, outputs):
    """The study of one victim, the victim, and the runs of a trial."""
    config = load_config(written("disappearance"))
    check_data(config)
    console = Console(quiet=True)
    victims = prepare_victims(config, outputs / "victims", torch.device("cpu"), console)
    return config, victims, prepare_cases(config, victims, console)


@pytest.fixture(scope="module")
def finished(prepared, outputs):
    """The folder of that study with one real trial, and what was reported while it ran."""
    config, victims, cases = prepared
    reports = []
    (result,) = run_trials(
        [config.defence_config({"lr": 0.02})],
        cases,
        seed=0,
        report_every=1,
        on_report=lambda trial, victim, log, scores: reports.append((victim, log.step, scores)),
        rules=TrialRules.of(config),
    )
    folder = outputs / config.name
    kept = folder / "trials" / "000"
    kept.mkdir(parents=True)
    digests = {name: victim.spec.digest for name, victim in victims.items()}
    record = {
        "schema": SCHEMA,
        "number": 0,
        "status": "COMPLETE",
        "reason": None,
        "preset": None,
        "parameters": {"lr": 0.02},
        **result.outcome(),
        "device": "cpu",
        "ended": 1.7e9,
        "provenance": {"study": config.digest, "victims": digests, "seed": 0}
        | {"commit": "0123456789ab", "versions": {}},
    }
    for key, case in result.cases.items():
        stem = defence_of(case.result.config).stem
        save_file(case.tensors, kept / f"{key}.{stem}.safetensors")
        steps = [asdict(log) for log in case.result.history]
        (kept / f"{key}.rounds.json").write_text(json.dumps(steps))
    (folder / records.TRIALS).write_text(json.dumps(record) + "\n")
    (folder / records.STUDY).write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    summary = summarise(config, folder, records.read_trials(folder), victims)
    jobs = jobs_of(config, {"chosen": config.defence_config({"lr": 0.02})})
    rows = [confirm(job, victims[job.victim], config) for job in jobs]
    summary["suite"] = confirmation(rows, victims)
    (folder / records.SUMMARY).write_text(json.dumps(summary))
    return folder, reports


def test_a_trial_leaves_the_scores_of_its_task(prepared, finished):
    _, victims, _ = prepared
    folder, reports = finished
    (trial,) = records.read_trials(folder)
    scores = trial["scores"][NAME]
    assert {field.name for field in fields(DetectionScores)} <= set(scores)
    before = victims[NAME].scores["val"]
    assert trial["accuracy_drop"] == pytest.approx(before.map50 - trial["map50"])
    assert trial["map50"] == scores["map50"]
    assert 0 <= trial["risk"] <= 1
    assert "clean_accuracy" not in trial
    victim, step, last = reports[-1]
    assert (victim, step) == (NAME, trial["rounds"] - 1)
    assert last.split == "val"


def test_the_victim_is_left_as_it_was(prepared, outputs):
    _, victims, _ = prepared
    stored = load_victim(outputs / "victims" / victims[NAME].spec.digest)
    for name, value in stored.model.state_dict().items():
        assert torch.equal(value, victims[NAME].model.state_dict()[name]), name


def test_the_choice_is_scored_on_test_from_what_the_trial_stored(prepared, finished):
    _, victims, _ = prepared
    summary = records.read_summary(finished[0])
    victim = victims[NAME]
    assert summary["chosen"]["number"] == 0
    assert summary["objectives"] == {"map50": "maximize", "attack_success": "minimize"}
    assert summary["min_clean_accuracy"] == pytest.approx(victim.scores["val"].map50 - 0.9)
    found = summary["chosen"]["victims"][NAME]
    assert found["split"] == "test"
    assert found["n_clean"] == len(victim.load_data().test)
    assert set(summary["chosen"]["test"]) == set(DETECTION.metrics)
    best = yaml.safe_load((finished[0] / records.BEST).read_text())
    assert (best["task"], best["defence"]) == ("detection", "soft_branch")


def test_the_confirmation_spreads_the_scores_of_the_task(finished):
    (role,) = records.read_summary(finished[0])["suite"]["chosen"]["roles"].values()
    assert set(role) == {*DETECTION.metrics, "accuracy_drop", "n_failed"}
    assert role["true_detection"]["n"] == 1


def test_gates_judge_it_and_say_what_is_missing(finished, outputs):
    verdicts = {one.gate: one for one in verdicts_of(read_candidate("detectors", outputs, None))}
    assert verdicts["accuracy_drop"].passed
    assert verdicts["attack_success"].passed
    assert not verdicts["seeds"].passed, "one seed was asked for, two are needed"


def test_the_page_has_the_words_of_the_task_and_what_is_found(finished, outputs):
    folder, _ = finished
    content = page_content(read(folder))
    assert (content["quality"], content["recovered"], content["price"]) == (
        *("map50", "true_detection", "mAP@50"),
    )
    assert content["scores"] == list(DETECTION.metrics)
    assert "mAP@50" in content["headline"]["title"]
    assert "accuracy" not in content["headline"]["title"]
    told = []
    text = write_report(folder, outputs / "victims", say=told.append).read_text()
    assert not told
    data = json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    pictures = data["close_ups"]["trials"]["0"]["victims"][NAME]["answers"]["pictures"]
    before = data["close_ups"]["victims"][NAME]["pictures"]
    assert list(pictures) == list(before) == ["clean", "triggered"]
    assert all(one.startswith("data:image/jpeg;base64,") for one in pictures.values())
    assert before["clean"] != before["triggered"]


def test_a_victim_is_drawn_clean_above_triggered(prepared, tmp_path):
    _, _, cases = prepared
    draw_victims(tmp_path / "victims", cases)
    with Image.open(tmp_path / "victims" / f"{NAME}.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    middle = len(pixels) // 2
    assert (pixels[:middle] == (0, 0, 255)).all(2).sum() == 0
    assert (pixels[middle:] == (0, 0, 255)).all(2).sum() > 0, "the trigger is a blue square"


@pytest.mark.slow
@pytest.mark.ray
def test_a_whole_study_of_two_attacks(written, outputs, capsys):
    path = written("misclassification", "disappearance", name="whole", selection="blind")
    assert run.run_study(path, {}, outputs=outputs, address="local")
    folder: Path = outputs / "whole"
    summary = records.read_summary(folder)
    assert summary["n_complete"] == 2
    assert summary["objectives"] == {"map50": "maximize", "risk": "minimize"}
    assert summary["selection"]["used"] == "blind"
    assert set(summary["suite"]["chosen"]["victims"]) == {"set-misclassification", NAME}
    assert (folder / "report.html").is_file()
    assert sorted(one.name for one in (folder / "victims").iterdir()) == [
        "set-disappearance.png",
        "set-misclassification.png",
    ]
    said = capsys.readouterr().out
    assert "TDR@50 %" in said
    frame = records.load("whole", outputs)
    assert {"map50", "true_detection", "risk"} <= set(frame.columns)
    assert run.run_study(None, {}, outputs=outputs, address="local", resume="whole")
    assert "finished, all 2 trials" in capsys.readouterr().out
