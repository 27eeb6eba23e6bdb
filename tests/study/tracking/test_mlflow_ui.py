"""What docs/studies.md says to type into MLflow's search box finds it, in the store and in the UI."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import yaml

from study.spec.config import StudyConfig
from study.tracking.mlflow_runs import KIND, Tracker, tracking_uri
from study.tracking.recorder import Recorder

PAGE = (Path(__file__).parents[3] / "docs" / "studies.md").read_text()
GOOD, FRONT, LOST = next(
    block.strip().splitlines()
    for block in re.findall(r"```text\n(.*?)```", PAGE, re.S)
    if block.startswith("metrics.")
)


def recorded(large_study, outputs, count):
    """The first trials of the study, as the recorder hands them to a real store."""
    summary = json.loads((large_study / "summary.json").read_text())
    rows = [json.loads(line) for line in (large_study / "trials.jsonl").read_text().splitlines()][
        :count
    ]
    study = StudyConfig.model_validate(yaml_of(large_study) | {"name": "ims-digits"})
    digests = rows[0]["provenance"]["victims"]
    tracker = Tracker(tracking_uri(outputs), outputs / "mlartifacts")
    tracker.start_study("ims-digits", {"trials": count}, {"study": "ims-digits"})
    (outputs / "ims-digits").mkdir()
    recorder = Recorder(study, outputs / "ims-digits", tracker, digests, lambda records: None)
    for row in rows:
        number = row["number"]
        recorder.started(number, row["preset"], row["parameters"])
        if row["status"] == "COMPLETE":
            recorder.completed(number, row, large_study / "trials" / f"{number:03d}")
        elif row["status"] == "PRUNED":
            recorder.pruned(number, row | {"stopped": row["reason"]})
        else:
            recorder.failed(number, row["reason"])
        recorder.write()
    front = [point["number"] for point in summary["front"] if point["number"] < count]
    tracker.end_study(metrics={"hypervolume": 0.5}, artifacts=[], front=front, chosen=front[0])
    return SimpleNamespace(rows=rows, front=front, uri=tracker.uri, client=tracker.client)


def yaml_of(folder):
    return yaml.safe_load((folder / "study.yaml").read_text())


def numbers(rows, wanted):
    return {row["number"] for row in rows if wanted(row)}


def good(row, success=0.05, accuracy=0.97):
    complete = row["status"] == "COMPLETE"
    return complete and row["attack_success"] < success and row["clean_accuracy"] > accuracy


def lost(row):
    return row["status"] == "FAILED"


def test_the_three_queries_of_the_readme_find_what_they_say(large_study, tmp_path):
    store = recorded(large_study, tmp_path, 40)
    (experiment,) = mlflow.MlflowClient(store.uri).search_experiments(filter_string="name = 'bimask'")

    def found(query):
        runs = store.client.search_runs([experiment.experiment_id], query)
        return {int(run.data.tags["trial"]) for run in runs}

    # the bounds of the first query are the reader's own; the records decide what they hold for
    looser = GOOD.replace("0.05", "0.5").replace("0.97", "0.9")
    expected = numbers(store.rows, lambda row: good(row, success=0.5, accuracy=0.9))
    assert found(looser) == expected
    assert 0 < len(expected) < 40
    assert found(GOOD) == numbers(store.rows, good)
    assert found(FRONT) == set(store.front)
    assert found(LOST) == numbers(store.rows, lost)
    assert numbers(store.rows, lost), "a study without failures proves nothing"


@pytest.mark.parametrize("before", [None, {}, {KIND: "classification"}])
def test_the_experiment_is_one_of_training(tmp_path, before):
    """So that MLflow's page opens on runs and scores; what somebody chose there stays."""
    uri = tracking_uri(tmp_path)
    client = mlflow.MlflowClient(uri)
    if before is not None:
        client.create_experiment("bimask", tags=before)
    Tracker(uri, tmp_path / "mlartifacts")
    kind = client.get_experiment_by_name("bimask").tags[KIND]
    assert kind == (before or {}).get(KIND, "custom_model_development")


@pytest.fixture
def server(large_study, tmp_path, mlflow_server):
    """A real `mlflow server` over the store of 100 trials."""
    store = recorded(large_study, tmp_path, 100)
    with mlflow_server(store.uri) as store.address:
        yield store


@pytest.mark.slow
def test_the_ui_searches_lists_and_compares_100_trials(server, browser, large_study):
    page = browser.new_page(viewport={"width": 1500, "height": 1400})
    page.set_default_timeout(60_000)
    page.goto(f"{server.address}/#/experiments/1/runs")
    page.wait_for_selector("text=ims-digits")

    def listed(query, count):
        page.fill("[data-testid=search-box]", query)
        page.keyboard.press("Enter")
        told = "(count) => document.body.innerText.match(/(\\d+)\\s+matching run/)?.[1] == count"
        page.wait_for_function(told, arg=count)
        names = page.locator(".ag-row a").all_inner_texts()
        return {int(name.removeprefix("trial-")) for name in names if name.startswith("trial-")}

    page.click("[data-testid=sort-select-dropdown]")
    page.locator("[role^=menuitem]", has_text="attack_success").first.click()
    page.keyboard.press("Escape")
    assert len(listed("", 100)) > 20  # as many as the window has room for
    for query, expected in (
        (LOST, numbers(server.rows, lost)),
        (GOOD, numbers(server.rows, good)),
        (FRONT, set(server.front)),
    ):
        assert listed(query, len(expected)) == expected

    page.locator("input[aria-label='Select all runs']").check(force=True)
    page.locator("button", has_text="Compare").first.click()
    page.wait_for_selector(f"text=Comparing {len(server.front)} Runs from 1 Experiment")
    page.wait_for_selector(".parcoords")
    axes = page.locator(".parcoords .axis-title").all_text_contents()
    # the first three settings by name and the first score that all have; the reader adds others
    assert {"inner_optimizer", "inner_steps", "clean_accuracy"} <= set(axes)
    assert set(axes) <= {*yaml_of(large_study)["space"], "clean_accuracy"}
