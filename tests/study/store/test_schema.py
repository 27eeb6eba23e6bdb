"""Records are typed and numbered by their schema; a folder of schema 1 is read, shown and promoted.

`schema_1` is a study of two victims and four trials, run by the program as it was before records had a
number, with its victims beside it.
"""

import io
import json
import shutil
from pathlib import Path

import pytest

import study
from bimask.progress import Console
from study.promote import promote
from study.promotion.candidate import read_candidate
from study.promotion.registry import Registry
from study.report import write_report
from study.report.content import page_content, read
from study.search.warm_start import read_earlier
from study.spec.config import StudyError
from study.spec.reading import load_config
from study.store import records
from study.store.files import append_lines
from study.store.mending import digests_of
from study.store.schema import SCHEMA, study_summary, trial_record
from study.tracking.mlflow_runs import tracking_uri

OLD = Path(__file__).with_name("schema_1")


@pytest.fixture
def outputs(tmp_path, with_store):
    """A copy that may be written to."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    return with_store(tmp_path)


def raw(name):
    return [json.loads(line) for line in (OLD / "old" / name).read_text().splitlines()]


def test_old_records_are_of_todays_schema_once_read_and_lose_nothing():
    trials = records.read_trials(OLD / "old")
    assert trials == [row | {"schema": SCHEMA} for row in raw("trials.jsonl")]
    assert records.read_confirmed(OLD / "old") == [r | {"schema": SCHEMA} for r in raw("confirm.jsonl")]
    assert records.read_reports(OLD / "old") == raw("reports.jsonl")
    summary = json.loads((OLD / "old" / "summary.json").read_text())
    assert records.read_summary(OLD / "old") == summary | {"schema": SCHEMA}


def test_what_the_oldest_summaries_lack_has_its_meaning():
    summary = json.loads((OLD / "old" / "summary.json").read_text())
    for later in ("selection", "aggregate", "n_pruned"):
        del summary[later]
    found = study_summary(summary)
    assert found["selection"]["oracle"] == summary["chosen"]
    assert found["selection"]["blind"] is None
    assert found["aggregate"] == {}
    assert found["n_pruned"] == 0


def test_what_the_oldest_records_lack_has_its_meaning():
    row = raw("trials.jsonl")[0]
    assert trial_record({key: value for key, value in row.items() if key != "ended"})["ended"] == 0


def test_an_old_study_loads():
    table = study.load("old", OLD)
    assert list(table["number"]) == [0, 1, 2, 3]
    assert table["attack_success"].between(0, 1).all()
    assert "schema" not in table


def test_an_old_study_has_a_page(outputs):
    page = write_report(outputs / "old", outputs / "victims")
    assert "digits-blended" in page.read_text()
    content = page_content(read(outputs / "old"))
    assert content["chosen"] == 3
    assert content["blind"]["oracle"] == 3
    assert len(content["tested"]) == 3


def test_an_old_study_warms_a_new_one(outputs):
    config = load_config(outputs / "old" / "study.yaml", {"name": "new"})
    again = config.model_copy(update={"warm_start_from": [str(outputs / "old")]})
    assert len(read_earlier(again).observed) == 3


def test_an_old_study_is_promoted(outputs, monkeypatch):
    monkeypatch.setattr("study.promotion.candidate.commit", lambda: "0123456789ab")
    out = Console(file=io.StringIO(), width=140)
    asked = {"rollback": False, "confirm_": False, "model": None, "victim": None}
    assert promote("old", None, outputs=outputs, console=out, apply_=True, **asked)
    assert Registry(tracking_uri(outputs), "old").champion().tags["trial"] == "3"


def test_a_later_schema_is_refused():
    with pytest.raises(StudyError, match="schema is 3, and this version reads up to 2"):
        trial_record(raw("trials.jsonl")[0] | {"schema": 3})


@pytest.mark.parametrize(
    ("line", "said"),
    [("[]", "it is list"), ('{"number": "x"}', "number: input should be a valid integer")],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, said):
    good = (OLD / "old" / "trials.jsonl").read_text()
    (tmp_path / "trials.jsonl").write_text(good + line + "\n")
    with pytest.raises(StudyError, match=f"trials.jsonl:5 cannot be read: {said}"):
        records.read_trials(tmp_path)


def test_a_trial_whose_files_are_not_those_it_left_is_not_promoted(outputs):
    folder = outputs / "old" / "trials" / "003"
    path = outputs / "old" / "trials.jsonl"
    rows = [dict(row) for row in records.read_trials(outputs / "old")]
    rows[3]["files"] = digests_of(folder)
    path.unlink()
    append_lines(path, rows)
    assert read_candidate("old", outputs, 3).number == 3
    masks = next(folder.glob("*.masks.safetensors"))
    masks.write_bytes(masks.read_bytes()[:-1] + b"\0")
    with pytest.raises(
        StudyError, match=r"Trial 3 of 'old' cannot be promoted: its file .* another con"
    ):
        read_candidate("old", outputs, 3)


def test_a_study_that_lacks_what_every_study_has_is_told_of(outputs):
    (outputs / "old" / "study.yaml").write_text("- a\n- b\n")
    with pytest.raises(StudyError, match="study.yaml has no name and victims"):
        read(outputs / "old")
