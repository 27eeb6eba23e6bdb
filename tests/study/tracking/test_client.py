"""Words of strangers reach MLflow's store whole or cut, spelled as MLflow takes them; a real store."""

import pytest
from mlflow.tracking import MlflowClient

from study.spec.config import StudyError
from study.store.databases import sqlite_url
from study.tracking.client import MOST_IN_A_KEY, key_of, text_of
from study.tracking.mlflow_runs import Tracker, quoted

ODD = "a\x1b]0;mine\x07\u202eb $x$ [red]<script>"


def test_what_a_study_says_is_taken_whatever_its_names_are(tmp_path, with_store):
    store = with_store(tmp_path)
    tracker = Tracker(sqlite_url(store / "mlflow.db"), store / "mlartifacts")
    long = "v" * 400
    tracker.start_study(ODD, {"victims": ODD + "x" * 9_000}, {f"victim.{long}": ODD, ODD: long * 40})
    tracker.start_trial(0, {ODD: ODD}, {f"victim.{long}1": "1", f"victim.{long}2": "2"})
    curves = {f"{long}/loss/one": [(0, 1.0)], f"{long}/loss/two": [(0, 2.0)]}
    tracker.end_trial(0, reason=f"{ODD}\n{ODD}" + "x" * 10**6, histories=curves)
    tracker.end_study(metrics={f"chosen/{ODD}": 0.5}, artifacts=[], note=f"**{ODD}**\n{ODD}")
    client = MlflowClient(tracker.uri)
    study, trial = (client.get_run(one).data for one in (tracker.parent_id, tracker.runs[0]))
    told = [*study.tags.items(), *study.params.items(), *trial.tags.items(), *trial.params.items()]
    for name, value in told:
        assert name.isprintable()
        assert len(name) <= MOST_IN_A_KEY
        assert value.replace("\n", "").isprintable(), name
        assert len(value) <= 5_000
    assert len(trial.metrics) == 2
    assert sorted(trial.metrics.values()) == [1.0, 2.0]
    assert sum(name.startswith("victim.vvv") for name in trial.tags) == 2
    assert "<script>" in trial.tags["reason"]  # MLflow's page escapes; the store has what was said


@pytest.mark.parametrize("name", ["plain", "a/b c:d-e.f_g", "x" * 250])
def test_a_sound_name_stays(name):
    assert key_of(name) == name
    assert text_of(f"{name}\n{name}") == f"{name}\n{name}"
    assert text_of(None) == "null"


def test_a_search_is_for_one_name():
    assert quoted("a b") == "'a b'"
    for odd in ("a' or 'b", "a\\"):
        with pytest.raises(StudyError, match="quotation mark"):
            quoted(odd)
