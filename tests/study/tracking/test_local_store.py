"""MLflow's store in a SQLite file: first launches at once, garbage, locks, odd names, a move."""

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from bimask.progress import Console
from study.pipeline.opening import open_tracker
from study.spec.config import StudyConfig, StudyError
from study.store.databases import sqlite_path, sqlite_url
from study.tracking.local_store import held
from study.tracking.mlflow_runs import Tracker, log_to_study, tracking_uri

ROOT = Path(__file__).parents[3]
TAGS = {"study_id": "abc", "study": "s", "study_digest": "d"}
CONFIG = StudyConfig.model_validate(
    {
        "name": "s",
        "trials": 1,
        "environment_timeout": 30,
        "victims": [
            {"dataset": "digits", "net": "small_resnet", "width": 4, "attack": {"name": "badnets"}}
        ],
        "reference_point": {"clean_accuracy": 0.1, "attack_success": 1.0},
        "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True}},
    }
)


@pytest.mark.parametrize("name", ["a?b", "a#b", "a%41b", "a{x}b", "a b&c=d", "a[x]'q", "ü"])
def test_a_url_names_the_path_and_nothing_else(tmp_path, name):
    url = sqlite_url(tmp_path / name / "mlflow.db")
    assert sqlite_path(url) == tmp_path / name / "mlflow.db"


@pytest.mark.parametrize("uri", ["http://host:5000", "postgresql://u@h/d", "sqlite://", "what?"])
def test_what_names_no_sqlite_file(uri):
    assert sqlite_path(uri) is None


def test_a_store_in_a_folder_with_odd_characters_is_in_it(tmp_path):
    outputs = tmp_path / "a?b#c%41[x] y"
    (outputs / "files").mkdir(parents=True)
    (outputs / "files" / "masks").write_text("masks")
    tracker = Tracker(tracking_uri(outputs), outputs / "mlartifacts")  # the tables are made here
    tracker.start_study("s", {}, TAGS)
    tracker.log_folder(outputs / "files")
    assert (outputs / "mlflow.db").is_file()
    assert len(list(outputs.rglob("mlartifacts/**/masks"))) == 1
    assert list(tmp_path.iterdir()) == [outputs], "and nothing beside it"
    assert "'" in tracker.ui_command(), "quoted for a shell"


def test_a_kill_while_the_tables_were_made_costs_nothing(tmp_path):
    def killed(uri):
        sqlite3.connect(sqlite_path(uri)).execute("CREATE TABLE _alembic_tmp_tags (x)")
        raise KeyboardInterrupt

    uri = sqlite_url(tmp_path / "mlflow.db")
    with pytest.raises(KeyboardInterrupt), held(uri, killed):
        pass
    assert not (tmp_path / "mlflow.db").exists()
    made = []
    with held(uri, lambda part: made.append(shutil.copy(part_of(tmp_path), sqlite_path(part)))):
        assert (tmp_path / "mlflow.db").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mlflow.db.lock", "mlflow.db", "other"]


def part_of(folder):
    (folder / "other").write_bytes(b"tables")
    return folder / "other"


@pytest.mark.slow
def test_first_launches_at_once_share_a_store(tmp_path):
    code = (
        "import sys; from pathlib import Path; from study.tracking.mlflow_runs import *\n"
        "outputs = Path(sys.argv[1])\n"
        "tracker = Tracker(tracking_uri(outputs), outputs / 'mlartifacts')\n"
        "tracker.start_study(sys.argv[2], {}, {'study_id': sys.argv[2]})"
    )
    launches = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path, f"s{number}"], cwd=ROOT, stderr=subprocess.PIPE
        )
        for number in range(3)
    ]
    said = [launch.communicate()[1].decode() for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0, 0], said
    assert "Traceback" not in "".join(said)
    client = mlflow.MlflowClient(tracking_uri(tmp_path))
    (experiment,) = client.search_experiments(filter_string="name = 'bimask'")
    assert len(client.search_runs([experiment.experiment_id])) == 3


@pytest.mark.parametrize("content", [b"no database at all " * 99, b"SQLite format 3\0" + bytes(8000)])
def test_garbage_for_a_store_is_one_sentence(tmp_path, capfd, content):
    (tmp_path / "mlflow.db").write_bytes(content)
    with pytest.raises(StudyError, match=r"mlflow.db cannot be opened"):
        Tracker(tracking_uri(tmp_path), tmp_path / "mlartifacts")
    assert "Traceback" not in capfd.readouterr().err


def test_a_store_of_a_later_mlflow_is_one_sentence(tmp_path, with_store):
    with_store(tmp_path)
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        store.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(StudyError, match=r"mlflow.db cannot be opened"):
        Tracker(tracking_uri(tmp_path), tmp_path / "mlartifacts")


def test_a_locked_store_is_waited_for_and_told_without_a_traceback(tmp_path, with_store, capfd):
    with_store(tmp_path)
    other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")

    class Reader(Console):
        def print(self, *words, **options):
            super().print(*words, **options)
            other.close()  # who reads that it is locked lets it go

    tracker = open_tracker(tracking_uri(tmp_path), tmp_path, CONFIG, Reader(width=300))
    said = capfd.readouterr()
    assert "database is locked" in said.out
    assert "going on" in said.out
    assert "Traceback" not in said.err
    tracker.start_study("s", {}, TAGS)


def test_a_study_that_was_moved_writes_to_where_it_is(tmp_path, with_store):
    with_store(tmp_path / "old")
    tracker = Tracker(tracking_uri(tmp_path / "old"), tmp_path / "old" / "mlartifacts")
    tracker.start_study("s", {}, TAGS)
    assert tracker.moved is None
    (tmp_path / "first").write_text("1")
    tracker.start_trial(0, {}, {})
    tracker.client.log_artifact(tracker.runs[0], str(tmp_path / "first"))
    (tmp_path / "old").rename(tmp_path / "new [x]")
    outputs = tmp_path / "new [x]"
    later = Tracker(tracking_uri(outputs), outputs / "mlartifacts")
    assert str(tmp_path / "old" / "mlartifacts") in later.moved
    assert str(outputs / "mlartifacts") in later.moved
    later.start_study("s", {}, TAGS)
    assert later.parent_id == tracker.parent_id
    (tmp_path / "second").write_text("2")
    later.start_trial(1, {}, {})
    later.client.log_artifact(later.runs[1], str(tmp_path / "second"))
    assert not (tmp_path / "old").exists()
    assert list(outputs.rglob("second"))
    uri = later.client.get_run(later.runs[0]).info.artifact_uri
    assert uri.startswith((outputs / "mlartifacts").as_uri()), "what was there is found there"
    assert Tracker(tracking_uri(outputs), outputs / "mlartifacts").moved is None, "told once"


def test_a_page_goes_to_where_a_moved_study_is(tmp_path, with_store):
    with_store(tmp_path / "old")
    tracker = Tracker(tracking_uri(tmp_path / "old"), tmp_path / "old" / "mlartifacts")
    tracker.start_study("s", {}, TAGS)
    (tmp_path / "old" / "mlartifacts").mkdir(exist_ok=True)
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "report.html").write_text("page")
    assert log_to_study(tracking_uri(tmp_path / "new"), "s", "d", tmp_path / "report.html")
    assert not (tmp_path / "old").exists()
    assert list((tmp_path / "new").rglob("report.html"))


def test_artifacts_that_stayed_behind_are_told_and_left_alone(tmp_path, with_store):
    with_store(tmp_path / "old")
    Tracker(tracking_uri(tmp_path / "old"), tmp_path / "old" / "mlartifacts")
    (tmp_path / "old" / "mlartifacts").mkdir(exist_ok=True)
    (tmp_path / "new").mkdir()
    (tmp_path / "old" / "mlflow.db").rename(tmp_path / "new" / "mlflow.db")
    tracker = Tracker(tracking_uri(tmp_path / "new"), tmp_path / "new" / "mlartifacts")
    assert "are still in" in tracker.moved


def test_an_experiment_that_a_user_put_elsewhere_stays_there(tmp_path, with_store, monkeypatch):
    with_store(tmp_path)
    client = mlflow.MlflowClient(tracking_uri(tmp_path))
    client.create_experiment("own", artifact_location=(tmp_path / "elsewhere").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "own")
    assert Tracker(tracking_uri(tmp_path), tmp_path / "mlartifacts").moved is None
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
