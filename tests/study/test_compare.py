"""`study.compare` as a user runs it: bad input, a whole comparison, and one that is cut short twice."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

TINY = {
    "name": "tiny",
    "defences": ["clp", "ft_sam"],
    "published": ["clp"],
    "search_seconds": 6,
    "trials": 4,
    "budgets": [2, 5],
    "common": {
        "dataset": "digits",
        "image_size": 12,
        "net": "small_resnet",
        "width": 4,
        "epochs": 6,
        "attack": {"name": "badnets"},
        "min_clean_accuracy": 0.0,
        "min_attack_success": 0.0,
    },
    "tuning": [{}],
    "held_out": [{"attack": {"name": "blended", "alpha": 0.3}}],
    "seeds": {"tuning": [0], "judged": [1]},
    "choose": {"max_accuracy_drop": 0.9},
    "settings": {"ft_sam": {"fixed": {"epochs": 4}}},
}


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def run(*words):
    import typer

    from study.compare import main

    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_what_cannot_be_compared_is_one_sentence_and_leaves_nothing(tmp_path, suite):
    suite.write_text(yaml.safe_dump(TINY | {"defences": ["magic"]}))
    for words in (
        [suite, "--outputs", tmp_path / "out"],
        ["--resume", "nothing", "--outputs", tmp_path / "out"],
        ["--outputs", tmp_path / "out"],
        [tmp_path / "none.yaml", "--outputs", tmp_path / "out"],
    ):
        result = run(*words)
        assert result.exit_code == 2, result.output
        assert "error" in result.output
        assert "Traceback" not in result.output
    assert not list((tmp_path / "out").iterdir())


def test_more_images_than_a_class_has_is_refused_before_anything_is_trained(tmp_path, suite):
    suite.write_text(yaml.safe_dump(TINY | {"budgets": [2, 5000]}))
    result = run(suite, "--outputs", tmp_path / "out")
    assert result.exit_code == 2
    assert "5000" in result.output
    assert not (tmp_path / "out" / "tiny").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_a_comparison_that_is_cut_short_twice_ends_as_one(tmp_path, suite):
    outputs = tmp_path / "out"
    command = [sys.executable, "-m", "study.compare", "--outputs", str(outputs)]
    log = (tmp_path / "log").open("w")

    def begin(*more):
        return subprocess.Popen([*command, *more], stdout=log, stderr=log, start_new_session=True)

    def until(holds, process, seconds=240):
        end = time.monotonic() + seconds
        while not holds() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)

    first = begin(str(suite))
    until(lambda: (outputs / "tiny.clp" / "trials.jsonl").is_file(), first)
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait(120) == 128 + signal.SIGTERM
    second = begin("--resume", "tiny")
    until(lambda: (outputs / "tiny" / "judged.jsonl").is_file(), second)
    os.kill(second.pid, signal.SIGKILL)
    second.wait(60)
    with (outputs / "tiny" / "judged.jsonl").open("ab") as file:
        file.write(b'{"entry": "clp", "bud')  # torn, as by a power cut
    assert begin("--resume", "tiny").wait(300) == 0, (tmp_path / "log").read_text()
    assert "go on with --resume tiny" in (tmp_path / "log").read_text()

    rows = [json.loads(line) for line in (outputs / "tiny" / "judged.jsonl").read_text().splitlines()]
    keys = [(row["entry"], row["budget"], row["victim"]) for row in rows]
    assert len(keys) == len(set(keys)) == 3 * 2 * 3
    found = json.loads((outputs / "tiny" / "comparison.json").read_text())
    assert set(found["searched"]) == {"clp", "ft_sam", "clp-published"}
    assert (outputs / "tiny" / "comparison.csv").read_text().count("\n") == 1 + 3 * 2 * 3
    assert "tiny: defences compared" in (outputs / "tiny" / "comparison.html").read_text()

    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "bimask"]
    (parent,) = client.search_runs([experiment.experiment_id], "tags.comparison = 'tiny'")
    assert parent.info.status == "FINISHED"
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    below = client.search_runs([experiment.experiment_id], query)
    assert sorted(run.data.tags["study"] for run in below) == ["tiny.clp", "tiny.ft_sam"]
    assert all("trial" not in run.data.tags for run in below), "trials stay below their study"
