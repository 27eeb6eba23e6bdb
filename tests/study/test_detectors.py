"""Studies of detectors: a trial, its summary and its page, and a whole study with real Ray and MLflow.

The pictures are six canvases, each in eight files under as many names, so that a detector that trains
for seconds finds in `val` and `test` what it has seen.
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import fields
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from bimask.data import load_data
from bimask.detection.data import canvases
from bimask.detection.metrics import DetectionScores
from bimask.detection.predictor import DetectionPredictor
from bimask.detection.victims import load_victim
from bimask.progress import Console
from bimask.tasks import DETECTION, defence_of
from study import promote as promoting
from study.pipeline import run
from study.pipeline.prepare import check_data, prepare_cases, prepare_victims
from study.pipeline.summary import summarise
from study.promotion.candidate import load_victims, read_candidate, verdicts_of
from study.promotion.packing import stored
from study.promotion.registry import Registry, as_png, fetch_config, load_classifier
from study.report import write_report
from study.report.content import page_content, read
from study.report.pictures import draw_victims
from study.search.actor import write_artifacts
from study.spec.config import StudyError
from study.spec.reading import load_config
from study.store import records
from study.store.schema import SCHEMA
from study.tracking.mlflow_runs import tracking_uri
from study.trial.rules import TrialRules
from study.trial.run import run_trials
from study.trial.suite import confirm, confirmation, jobs_of

DISTINCT, COPIES = 6, 8
LARGER = 40  # a picture of 120x100 pixels, all others have 96x96
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
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canvases")
    data = canvases(
        load_data("digits", image_size=8).train, DISTINCT, generator=torch.Generator().manual_seed(0)
    )
    images, objects = [], []
    for row in range(DISTINCT * COPIES):
        image, target = data.images[row % DISTINCT], data.targets[row % DISTINCT]
        if row == LARGER:
            image = torch.nn.functional.pad(image, (0, 24, 0, 4))
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
    (folder / "trials").mkdir(parents=True)
    write_artifacts(result, folder / "trials" / "000", 0)
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


@pytest.fixture(scope="module")
def registered(finished, outputs, tmp_path_factory):
    """A copy of all that is there, where one more seed is confirmed and the trial is registered; what
    was printed."""
    copy = tmp_path_factory.mktemp("registered") / "outputs"
    shutil.copytree(outputs, copy)
    path = copy / "detectors" / records.STUDY
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"confirm": {"seeds": 2}}))
    stream = io.StringIO()
    options = {"apply_": True, "rollback": False, "confirm_": True, "model": None, "victim": None}
    with pytest.MonkeyPatch.context() as patch:  # whatever the state of the sources that are tested
        patch.setattr("study.promotion.candidate.commit", lambda: "0123456789ab")
        console = Console(file=stream, width=140)
        assert promoting.promote("detectors", None, outputs=copy, console=console, **options)
    return copy, stream.getvalue()


@pytest.fixture(scope="module")
def in_memory(prepared, finished):
    """The victim with the weights that its trial stored."""
    victim = prepared[1][NAME]
    path = finished[0] / "trials" / "000" / f"{NAME}.tensors.safetensors"
    model = defence_of(prepared[0].defence_config({"lr": 0.02})).restore(
        victim.model, load_file(path), prepared[0].defence_config({"lr": 0.02})
    )
    return DetectionPredictor(model, victim.classes, 120)


def test_what_the_trial_stored_is_packed(prepared, finished, outputs):
    config = prepared[0]
    candidate = read_candidate("detectors", outputs, None)
    kept = stored(candidate, NAME, load_victims(config, outputs)[NAME].model)
    assert kept is not None
    assert kept.changed
    assert kept.passes.backward > 0


def test_a_version_is_registered_with_its_evidence(registered):
    outputs, printed = registered
    registry = Registry(tracking_uri(outputs), "detectors")
    assert "registered: detectors version 1" in printed
    champion = registry.champion()
    assert champion.number == "1"
    assert champion.tags["purified_victim"] == NAME
    assert {"victims_digest", "test.attack_success", "test.accuracy_drop"} <= champion.tags.keys()
    version = registry.client.get_model_version("detectors", "1")
    assert "boxes, classes and scores of the objects found out" in version.description
    assert "mAP@50 drop" in version.description
    assert f"| {NAME} | tuning |" in version.description
    names = {one.path for one in registry.client.list_artifacts(version.run_id)}
    assert {"model", "report.html", "manifest.json", "best.yaml"} <= names
    files = [one for one in Path(version.source.removeprefix("file://")).rglob("*") if one.is_file()]
    assert not [one for one in files if one.suffix in (".pkl", ".pt", ".pth", ".bin")]


def test_it_takes_pictures_as_large_as_any_of_the_data(registered, prepared):
    """Those that the repair learned on are smaller: the largest is in another part."""
    splits = prepared[1][NAME].load_data()
    assert splits.train.clean_subset(2, seed=0).longest_side == 96
    path = next((registered[0] / "mlartifacts").rglob("artifacts/cleaned/manifest.json"))
    assert json.loads(path.read_text())["longest_side"] == 120


def test_its_configuration_is_one_of_bimask_purify(registered, prepared, tmp_path):
    path = fetch_config("models:/detectors@champion", tracking_uri(registered[0]), tmp_path)
    content = yaml.safe_load(path.read_text())
    assert (content["task"], content["defence"]) == ("detection", "soft_branch")
    assert content["purify"] == prepared[0].defence_config({"lr": 0.02}).model_dump(mode="json")


def test_a_table_of_classes_is_of_classifiers(registered):
    with pytest.raises(StudyError, match=r"detectors@champion is no classifier.*study\.serve"):
        load_classifier("models:/detectors@champion", tracking_uri(registered[0]))


def test_mlflow_loads_it_and_it_answers_as_in_memory(registered, prepared, in_memory):
    registry = Registry(tracking_uri(registered[0]), "detectors")
    version = registry.client.get_model_version("detectors", "1")
    loaded = mlflow.pyfunc.load_model(version.source)
    images = prepared[1][NAME].load_data().test.images[:8]
    answers = loaded.predict([as_png(image) for image in images])
    assert answers == in_memory([image.permute(1, 2, 0).numpy() for image in images])
    assert sum(len(one["labels"]) for one in answers), "it finds something"


@pytest.mark.slow
def test_a_fresh_process_needs_nothing_but_the_version(registered, prepared, in_memory, tmp_path):
    """The copy of bimask that travels with it has all that a detector asks for, and no study."""
    code = (
        "import json, sys, mlflow\n"
        "model = mlflow.pyfunc.load_model('models:/detectors@champion')\n"
        "import bimask\n"
        "print(json.dumps([bimask.__file__, model.predict(json.load(sys.stdin))]))"
    )
    images = [as_png(image) for image in prepared[1][NAME].load_data().test.images[:4]]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(images),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"MLFLOW_TRACKING_URI": tracking_uri(registered[0])},
    )
    assert done.returncode == 0, done.stderr
    place, answers = json.loads(done.stdout.splitlines()[-1])
    assert "code" in Path(place).parts
    assert answers == in_memory(images)


def test_it_is_served_by_its_alias(registered, prepared, in_memory, tmp_path):
    """The command, asked over the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["models:/detectors@champion", "--outputs", str(registered[0]), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "study.serve", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    try:
        images = prepared[1][NAME].load_data().test.images[:4]
        body = json.dumps({"inputs": [as_png(image) for image in images]}).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, kind)
        for _ in range(600):
            try:
                answer = urllib.request.urlopen(request, timeout=120).read()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
    finally:
        process.terminate()
        process.wait(60)
    found = json.loads(answer)["predictions"]
    assert found == in_memory([as_png(image) for image in images])
    assert "Traceback" not in (tmp_path / "log").read_text()


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
