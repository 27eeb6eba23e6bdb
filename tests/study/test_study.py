"""A whole study with real Ray, Optuna, MLflow and SQLite, on a victim that trains in seconds."""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import mlflow
import optuna
import pytest
import yaml
from safetensors.torch import load_file

import study as study_package
from bimask.defences.ims.purify import PurifyConfig
from bimask.progress import Console
from bimask.victims import obtain_victim
from study.analysis.pareto import ParetoFront
from study.pipeline import run
from study.report import log_report, write_report
from study.report.console import show
from study.report.content import headline
from study.spec.config import StudyConfig
from study.spec.directions import OBJECTIVES
from study.tracking.mlflow_runs import Tracker, tracking_uri
from study.trial.cases import Case
from study.trial.run import run_trials

pytestmark = pytest.mark.ray

TINY = {
    "name": "tiny",
    "trials": 4,
    "paper_defaults": False,
    "clean_images_per_class": 3,
    "report_every": 2,
    "victims": [
        {
            "dataset": "digits",
            "image_size": 12,
            "net": "small_resnet",
            "width": 4,
            "attack": {"name": "badnets"},
            "epochs": 6,
        }
    ],
    "reference_point": {"clean_accuracy": 0.3, "attack_success": 1.0},
    "choose": {"max_accuracy_drop": 0.5},
    "fixed": {
        "inner_optimizer": "sign",
        "step_size": None,
        "patience": None,
        "initialise_rounds": 2,
        "minimise_rounds": 2,
        "select_rounds": 2,
    },
    "space": {
        "mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True},
        "inner_steps": {"kind": "int", "low": 1, "high": 3},
    },
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, with_victim, kept_ray):
    return with_victim(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def path(outputs):
    path = outputs / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="module")
def finished(outputs, path):
    """The study, run once, as `python -m study.launch` does it."""
    with redirect_stdout(io.StringIO()) as printed:
        assert run.run_study(path, {"concurrency": 2}, outputs=outputs, address="local")
    folder = outputs / "tiny"
    summary = json.loads((folder / "summary.json").read_text())
    shown = printed.getvalue()
    return SimpleNamespace(folder=folder, outputs=outputs, summary=summary, shown=shown)


def mlflow_runs(outputs, name):
    client = mlflow.MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("bimask")
    (parent,) = client.search_runs([experiment.experiment_id], f"run_name = '{name}'")
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    return client, parent, client.search_runs([experiment.experiment_id], query)


def optuna_trials(folder, name):
    storage = f"sqlite:///{folder / 'optuna.db'}"
    loaded = optuna.load_study(study_name=name, storage=storage)
    assert [d.name for d in loaded.directions] == ["MAXIMIZE", "MINIMIZE"]
    return {trial.number: trial for trial in loaded.trials}


def test_every_trial_is_complete_in_ray_optuna_and_mlflow_alike(finished):
    trials = study_package.load("tiny", finished.outputs)
    assert trials["number"].tolist() == [0, 1, 2, 3]
    assert set(trials["status"]) == {"COMPLETE"}
    asked = optuna_trials(finished.folder, "tiny")
    assert {t.state.name for t in asked.values()} == {"COMPLETE"}
    for _, row in trials.iterrows():
        assert asked[row["number"]].values == [row[name] for name in OBJECTIVES]
    _, parent, children = mlflow_runs(finished.outputs, "tiny")
    assert parent.info.status == "FINISHED"
    assert len(children) == 4
    assert {child.info.status for child in children} == {"FINISHED"}


def test_all_trials_are_searched_and_say_where_they_come_from(finished):
    trials = [json.loads(x) for x in (finished.folder / "trials.jsonl").read_text().splitlines()]
    for trial in trials:
        assert set(trial["parameters"]) == set(TINY["space"])
        assert trial["rounds"] == 6
        assert trial["provenance"]["seed"] == 0
        assert {"torch", "ray", "optuna"} <= set(trial["provenance"]["versions"])


@pytest.mark.slow
def test_trial_0_is_the_papers_defaults(outputs, path):
    overrides = {"trials": 2, "paper_defaults": True, "name": "published"}
    assert run.run_study(path, overrides, outputs=outputs, address="local")
    folder = outputs / "published"
    lines = map(json.loads, (folder / "trials.jsonl").read_text().splitlines())
    trials = {trial["number"]: trial for trial in lines}
    assert trials[0]["parameters"] == PurifyConfig().model_dump()
    assert trials[0]["status"] == trials[1]["status"] == "COMPLETE"
    assert set(trials[1]["parameters"]) == set(TINY["space"])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["paper_defaults"]["number"] == 0
    states = {number: trial.state.name for number, trial in optuna_trials(folder, "published").items()}
    assert states == {0: "COMPLETE", 1: "COMPLETE"}


def test_a_nested_run_holds_parameters_losses_metrics_masks_and_a_picture(finished):
    client, _, children = mlflow_runs(finished.outputs, "tiny")
    child = next(c for c in children if c.data.tags["trial"] == "2")
    assert set(child.data.params) == set(TINY["space"])
    names = child.data.metrics
    for name in ("clean_accuracy", "attack_success", "recovery"):
        assert names[name] == names[f"digits-badnets/{name}"]
        curve = client.get_metric_history(child.info.run_id, f"digits-badnets/{name}")
        assert [metric.step for metric in curve] == [1, 3, 5, 6]
    losses = client.get_metric_history(child.info.run_id, "digits-badnets/loss/loss")
    assert [metric.step for metric in losses] == list(range(6))
    files = {item.path for item in client.list_artifacts(child.info.run_id)}
    assert {"digits-badnets.masks.safetensors", "digits-badnets.masks.png", "purify.yaml"} <= files
    path = client.download_artifacts(child.info.run_id, "purify.yaml")
    settings = PurifyConfig.from_yaml(path)
    assert settings.initialise_rounds == TINY["fixed"]["initialise_rounds"]
    assert str(settings.mask_lr) == child.data.params["mask_lr"]
    masks = load_file(client.download_artifacts(child.info.run_id, "digits-badnets.masks.safetensors"))
    assert "net.stem.0.mask" in masks
    assert "net.stem.0.selection" in masks


def test_the_parent_run_holds_the_finding_and_the_page(finished):
    client, parent, children = mlflow_runs(finished.outputs, "tiny")
    chosen = finished.summary["chosen"]["number"]
    told = headline(finished.summary, {"COMPLETE": 4})
    assert told["title"] in parent.data.tags["mlflow.note.content"]
    page = Path(client.download_artifacts(parent.info.run_id, "report.html"))
    assert page.read_text() == (finished.folder / "report.html").read_text()
    tagged = {int(c.data.tags["trial"]) for c in children if c.data.tags.get("pareto") == "front"}
    assert tagged == {point["number"] for point in finished.summary["front"]}
    assert [int(c.data.tags["trial"]) for c in children if "chosen" in c.data.tags] == [chosen]


def test_a_report_made_later_is_logged_to_the_same_run(finished):
    path = write_report(finished.folder, finished.outputs / "victims", finished.outputs / "later.html")
    assert "logged" in log_report(path, finished.folder, finished.outputs)
    client, parent, _ = mlflow_runs(finished.outputs, "tiny")
    assert "later.html" in {item.path for item in client.list_artifacts(parent.info.run_id)}


def test_the_summary_is_what_the_trials_say(finished):
    summary = finished.summary
    trials = study_package.load("tiny", finished.outputs)
    front = ParetoFront.of(trials[list(OBJECTIVES)].to_dict("records"))
    assert [point["number"] for point in summary["front"]] == list(front.indices)
    assert summary["hypervolume"] == pytest.approx(front.hypervolume(TINY["reference_point"]))
    assert summary["n_trials"] == summary["n_complete"] == 4
    assert summary["n_failed"] == 0
    for key in ("val", "test"):
        assert set(summary["chosen"][key]) == {"clean_accuracy", "attack_success", "recovery"}
    assert set(summary["seconds"]) == {"total", "in_trials", "harness"}
    assert summary["victims"]["digits-badnets"]["test"]["n_clean"] == 450


def test_best_yaml_gives_the_chosen_trial_again(finished):
    """The same configuration, seed and images purify to the same scores on test."""
    best = PurifyConfig.from_yaml(finished.folder / "best.yaml")
    config = StudyConfig.model_validate(yaml.safe_load((finished.folder / "study.yaml").read_text()))
    victim = obtain_victim(config.victims[0], finished.outputs / "victims")
    case = Case.of("digits-badnets", victim, config)
    (result,) = run_trials([best], [case], seed=0)
    chosen = finished.summary["chosen"]
    assert result.scores == pytest.approx(chosen["val"])
    kept = finished.folder / "trials" / f"{chosen['number']:03d}" / "digits-badnets.masks.safetensors"
    again = result.cases["digits-badnets"].tensors
    for name, values in load_file(kept).items():
        assert (values - again[name]).abs().max() < 1e-4


@pytest.fixture(scope="module")
def again(finished, path):
    """The same file, launched again: two trials, both in one actor."""
    victims = finished.outputs / "victims"
    kept = SimpleNamespace(
        summary=(finished.folder / "summary.json").read_bytes(),
        stamps={p: p.stat().st_mtime_ns for p in victims.rglob("*")},
    )
    overrides = {"trials": 2, "trials_per_actor": 2}
    assert run.run_study(path, overrides, outputs=finished.outputs, address="local")
    return kept


@pytest.mark.slow  # pipeline/test_prepare.py has the name, search/test_groups.py the numbers
def test_a_second_study_trains_nothing_takes_a_new_name_and_leaves_the_first_alone(finished, again):
    assert study_package.load("tiny-2", finished.outputs)["status"].tolist() == ["COMPLETE"] * 2
    assert (finished.outputs / "tiny-2" / "summary.json").is_file()
    assert (finished.folder / "summary.json").read_bytes() == again.summary
    victims = finished.outputs / "victims"
    assert {p: p.stat().st_mtime_ns for p in victims.rglob("*")} == again.stamps


@pytest.mark.slow
@pytest.mark.usefixtures("again")
def test_the_same_seed_gives_the_same_trials_however_many_an_actor_runs(finished):
    alone, together = (study_package.load(name, finished.outputs) for name in ("tiny", "tiny-2"))
    for column in ("parameters.mask_lr", "clean_accuracy", "attack_success", "recovery"):
        assert alone[column].tolist()[:2] == together[column].tolist()


def test_a_study_that_went_well_leaves_no_file_of_rays(finished):
    assert {path.name for path in finished.folder.iterdir()} == {
        *("study.yaml", "identity.json", "trials.jsonl", "reports.jsonl", "trials", "summary.json"),
        *("best.yaml", "front.png", "report.html", "optuna.db", "victims"),
    }


def test_the_link_that_is_printed_opens_on_the_trials_and_their_scores(
    finished, mlflow_server, browser, tmp_path
):
    """A real server and a real browser, in the state that the link sets: no click, no stored view."""
    (link,) = re.findall(r"runs:  http://127.0.0.1:5000(/#\S+)", finished.shown)
    _, parent, children = mlflow_runs(finished.outputs, "tiny")
    with mlflow_server(tracking_uri(finished.outputs)) as address:
        page = browser.new_page(viewport={"width": 1500, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(address + link)
        page.wait_for_selector("text=trial-003")
        page.screenshot(path=tmp_path / "trials.png")
        heads = page.locator("[role=columnheader]").all_inner_texts()
        assert page.locator("text=Model registry").count() == 1, "not the pages on chats"
        assert {"clean_accuracy", "attack_success", *TINY["space"]} <= set(heads)
        listed = page.locator(".ag-row a", has_text="trial-").all_inner_texts()
        by_success = sorted(children, key=lambda run: run.data.metrics["attack_success"])
        assert len(listed) == 4
        assert listed[0] == by_success[0].info.run_name
        cells = page.locator("[role=gridcell][col-id*=attack_success]").all_inner_texts()
        assert float(cells[0]) == pytest.approx(by_success[0].data.metrics["attack_success"], abs=1e-2)
        page.goto(f"{address}/#/experiments/1/runs/{parent.info.run_id}")
        with page.expect_popup() as opened:
            page.click("text=The study's page")
        shown = opened.value.frame_locator("iframe").locator("h1")
        assert "attack success" in shown.inner_text(timeout=60_000)
        opened.value.screenshot(path=tmp_path / "page.png")
        opened.value.close()
        page.close()


def test_a_picture_of_every_victim_is_in_the_parent_run(finished):
    client, parent, _ = mlflow_runs(finished.outputs, "tiny")
    logged = [item.path for item in client.list_artifacts(parent.info.run_id, "victims")]
    assert logged == ["victims/digits-badnets.png"]
    assert (finished.folder / logged[0]).read_bytes().startswith(b"\x89PNG")


def test_the_front_is_shown_with_the_two_commands_to_type_next(finished, capsys):
    tracker = Tracker(tracking_uri(finished.outputs), finished.outputs / "mlartifacts")
    console = Console(width=200)
    config = StudyConfig.model_validate(TINY)
    victims = finished.outputs / "victims"
    show(console, config, finished.summary, tracker, victims, finished.folder)
    shown = capsys.readouterr().out
    assert "mlflow ui --backend-store-uri sqlite:///" in shown
    assert "python -m bimask purify --victim" in shown
    assert "Pareto front of tiny" in shown
