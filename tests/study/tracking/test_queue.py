"""What MLflow does not take now it is told again: a real server is killed, a store is locked."""

import sqlite3
import time

import mlflow
import pytest

from study.tracking import queue as mirrors
from study.tracking.mlflow_runs import Tracker
from study.tracking.queue import MlflowQueue

TAGS = {"study_id": "abc", "study": "s"}


@pytest.fixture
def tracker(tmp_path, with_store):
    tracker = Tracker(f"sqlite:///{with_store(tmp_path) / 'mlflow.db'}", tmp_path / "mlartifacts")
    tracker.start_study("s", {"trials": 2}, TAGS)
    return tracker


def runs_of(tracker):
    client = mlflow.MlflowClient(tracker.uri)
    runs = client.search_runs([tracker.experiment_id])
    return client, {run.data.tags.get("trial", "parent"): run for run in runs}, len(runs)


def wait_until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"still waiting after {seconds} s"
        time.sleep(0.05)


def test_a_server_that_dies_delays_and_loses_nothing(server, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "masks").write_text("masks")
    tracker = Tracker(server.uri, tmp_path / "unused")
    tracker.start_study("s", {"trials": 3}, TAGS)
    troubles = []
    mirror = MlflowQueue(tracker, troubles.append)
    mirror.start_trial(0, {"mask_lr": 0.1}, {})
    wait_until(lambda: 0 in tracker.runs)
    server.kill()
    curve = [(step, float(step)) for step in range(1500)]  # two batches
    for number in (0, 1):
        if number:
            mirror.start_trial(number, {"mask_lr": 0.2}, {})
        mirror.end_trial(
            number,
            at=1e9,
            metrics={"seconds": 2.0},
            histories={"loss": curve},
            artifacts=tmp_path / "files",
        )
    mirror.start_trial(2, {}, {})
    mirror.end_trial(2, reason="deliberately bad")
    mirror.end_study(metrics={"hypervolume": 0.5}, artifacts=[])
    wait_until(lambda: troubles)
    server.start()
    assert mirror.close(lambda: 120) == 0
    client, runs, count = runs_of(tracker)
    assert count == 4
    assert {key: run.info.status for key, run in runs.items()} == {
        "parent": "FINISHED",
        "0": "FINISHED",
        "1": "FINISHED",
        "2": "FAILED",
    }
    for key in ("0", "1"):
        assert client.get_run(runs[key].info.run_id).info.end_time == 10**12
        history = client.get_metric_history(runs[key].info.run_id, "loss")
        assert [(metric.step, metric.value) for metric in history] == curve
        assert [item.path for item in client.list_artifacts(runs[key].info.run_id)] == ["masks"]
    assert len(troubles) == 1, "it is said once"


def test_a_store_that_stays_locked_is_told_what_it_lacks(tracker, tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "LONGEST_PAUSE", 0.1)
    mirror = MlflowQueue(tracker, lambda _: None)
    other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    mirror.start_trial(0, {}, {})
    mirror.end_trial(0, reason="x")
    assert mirror.close(lambda: 0.3) == 2
    other.execute("ROLLBACK")
    other.close()


def test_a_call_that_is_refused_holds_up_no_other(tracker, monkeypatch):
    monkeypatch.setattr(mirrors, "PAUSE", 0.001)
    monkeypatch.setattr(mirrors, "LONGEST_PAUSE", 0.01)
    mirror = MlflowQueue(tracker, lambda _: None)
    mirror.end_trial(7, reason="it was never started")
    mirror.start_trial(0, {}, {})
    mirror.end_trial(0, metrics={"seconds": 1.0})
    assert mirror.close(lambda: 30) == 1
    _, runs, _ = runs_of(tracker)
    assert runs["0"].info.status == "FINISHED"


def test_a_study_gone_on_with_finds_its_runs_again_and_telling_twice_changes_nothing(tracker, tmp_path):
    def tell(tracker):
        tracker.start_trial(0, {"a": 1}, {})
        tracker.end_trial(0, at=1e9, metrics={"x": 1.0}, histories={"loss": [(0, 1.0), (1, 0.5)]})

    tell(tracker)
    tracker.start_trial(1, {}, {})
    tracker.close_open_trials("stopped", "KILLED")
    client = tracker.client
    client.create_run(  # a second run of trial 1, made by a call whose answer was lost
        tracker.experiment_id, tags={"mlflow.parentRunId": tracker.parent_id, "trial": "1"}
    )
    later = Tracker(tracker.uri, tmp_path / "mlartifacts")
    later.start_study("s", {"trials": 2}, TAGS)
    assert later.parent_id == tracker.parent_id
    assert later.runs == tracker.runs
    assert later.ended == {0}
    tell(later)
    later.start_trial(1, {}, {})
    later.end_trial(1)
    assert not later.has_whole("abc", 2), "the parent is open"
    later.end_study(metrics={}, artifacts=[])
    assert later.has_whole("abc", 2)
    assert not later.has_whole("other", 2)
    _, runs, count = runs_of(later)
    assert count == 3
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert "reason" not in runs["1"].data.tags
    assert len(client.get_metric_history(runs["0"].info.run_id, "loss")) == 2
