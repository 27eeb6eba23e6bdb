"""What a crash or a bad disk did to records is said, and costs what it hit and nothing else."""

import json
import shutil
from pathlib import Path

import pytest

from study.spec.config import StudyError
from study.store import records
from study.store.files import append_lines
from study.store.mending import digests_of, mend
from study.store.session import Identity

OLD = Path(__file__).with_name("schema_1") / "old"


@pytest.fixture
def folder(tmp_path):
    """A study of four trials whose records have checksums and digests, as they are written today."""
    shutil.copytree(OLD, tmp_path / "study")
    folder = tmp_path / "study"
    rows = records.read_trials(folder)
    for row in rows:
        if row["status"] == "COMPLETE":
            row["files"] = digests_of(folder / "trials" / f"{row['number']:03d}")
    for name, found in (
        (records.TRIALS, rows),
        (records.REPORTS, records.read_reports(folder)),
        (records.CONFIRM, records.read_confirmed(folder)),
    ):
        (folder / name).unlink()
        first = ("schema", "number")  # as they are written
        append_lines(
            folder / name, [{k: row[k] for k in first if k in row} | dict(row) for row in found]
        )
    return folder


def numbers(folder):
    return [record["number"] for record in records.read_trials(folder)]


def cut(line):
    return line[: len(line) // 2]


def cut_with_end(line):
    return line[: len(line) // 2] + b"\n"


def nul(line):
    return line[:40] + bytes(len(line) - 41) + b"\n"


def nul_without_end(line):
    return line[:40] + bytes(len(line) - 40)


def another_digit(line):
    return line.replace(b'"clean_accuracy": 0.', b'"clean_accuracy": 1.', 1).replace(
        b'"seed": 0', b'"seed": 1', 1
    )


def another_type(line):
    return b"[1, 2]\n"


def no_text(line):
    return b"\xff\xfe" + line[2:]


def deep(line):
    return b'{"number": 3, "x": ' + b"[" * 100_000 + b"\n"


DAMAGES = [cut, cut_with_end, nul, nul_without_end, another_digit, another_type, no_text, deep]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [records.TRIALS, records.REPORTS, records.CONFIRM])
def test_a_damaged_last_line_costs_itself_alone(folder, name, damage):
    path = folder / name
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + damage(lines[-1]))
    (note,) = mend(folder)
    assert f"{name}:{len(lines)}" in note
    assert path.read_bytes().splitlines(keepends=True) == lines[:-1]
    assert path.with_name(f"{name}.damaged").read_bytes() == damage(lines[-1]).rstrip(b"\n") + b"\n"
    assert mend(folder) == [], "once"


@pytest.mark.parametrize("damage", [cut_with_end, nul, another_digit, no_text])
def test_a_damaged_line_in_the_middle_is_named_with_its_trial(folder, damage):
    path = folder / records.TRIALS
    before = numbers(folder)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = damage(lines[1])
    path.write_bytes(b"".join(lines))
    with pytest.raises(StudyError, match=r"trials.jsonl:2 cannot be read.*--resume"):
        records.read_trials(folder)
    (note,) = mend(folder)
    assert f"trial {before[1]} is run again" in note
    assert numbers(folder) == [before[0], *before[2:]]


def emptied(path):
    path.write_bytes(b"")


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [emptied, zeroed, halved, Path.unlink])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", ["*.safetensors", "*.rounds.json"])
def test_a_complete_trial_whose_files_cannot_be_read_is_run_again(folder, damage, signed, kind):
    if not signed:
        shutil.copy(OLD / records.TRIALS, folder / records.TRIALS)
        if kind == "*.rounds.json" and damage == Path.unlink:
            pytest.skip("records of before there were digests do not promise it")
    damage(next((folder / "trials" / "003").glob(kind)))
    (note,) = mend(folder)
    assert "trial 3 is run again" in note
    assert 3 not in numbers(folder)
    assert len(numbers(folder)) == 3


def test_a_picture_that_was_deleted_costs_nothing(folder):
    for path in folder.rglob("trials/*/*.png"):
        path.unlink()
    assert mend(folder) == []


def test_lines_of_before_there_were_checksums_stay_as_they_are(folder):
    shutil.copy(OLD / records.TRIALS, folder / records.TRIALS)
    assert mend(folder) == []
    assert (folder / records.TRIALS).read_bytes() == (OLD / records.TRIALS).read_bytes()


@pytest.mark.parametrize("content", [b"", b"{", bytes(500), b"[]", b'{"name": 1}'])
def test_a_damaged_summary_is_made_again(folder, content):
    (folder / records.SUMMARY).write_bytes(content)
    (note,) = mend(folder)
    assert "summary.json cannot be read" in note
    assert "is made again" in note


@pytest.mark.parametrize(
    "content",
    [b"", b"{", bytes(200), b"[]", b'{"study_id": 1, "digest": null, "victims": "x"}', b"\xff"],
)
def test_a_damaged_identity_is_refused_in_a_sentence(folder, content):
    (folder / "identity.json").write_bytes(content)
    with pytest.raises(StudyError, match=r"its identity.json cannot be read \(.*\); put it back"):
        Identity.load(folder)


def test_what_a_line_says_is_what_was_written(tmp_path):
    row = {"number": 1, "x": 1e22, "nan": float("nan"), "ü": "€\n", "nested": {"a": [0.1, None]}}
    append_lines(tmp_path / "rows", [row])
    assert len(json.loads((tmp_path / "rows").read_text())["checksum"]) == 8
    assert mend(tmp_path) == []


def test_records_of_a_later_version_are_left_where_they_are(folder):
    """They are whole: a version that cannot read them must not take them for damaged."""
    path = folder / records.TRIALS
    rows = [dict(row) | {"schema": 3} for row in records.read_trials(folder)]
    path.unlink()
    append_lines(path, rows)
    before = path.read_bytes()
    with pytest.raises(
        StudyError, match=r"trials.jsonl:1: its schema is 3, .*the version that wrote it"
    ):
        mend(folder)
    assert path.read_bytes() == before
    assert not path.with_name("trials.jsonl.damaged").exists()


def test_a_complete_record_without_what_every_trial_leaves_is_damaged(folder):
    path = folder / records.TRIALS
    rows = [dict(row) for row in records.read_trials(folder)]
    del rows[2]["scores"]
    path.unlink()
    append_lines(path, rows)
    (note,) = mend(folder)
    assert "scores: a complete trial has it" in note
    assert numbers(folder) == [row["number"] for row in rows if row is not rows[2]]


def test_what_the_environment_does_not_let_us_read_is_no_verdict_on_a_trial(folder):
    """A link to itself stands for a disk that answers with an error."""
    file = next((folder / "trials" / "001").glob("*.masks.safetensors"))
    file.unlink()
    file.symlink_to(file.name)
    with pytest.raises(OSError, match="Too many levels"):
        mend(folder)
    assert numbers(folder) == [0, 1, 2, 3]
