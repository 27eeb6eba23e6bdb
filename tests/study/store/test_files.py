"""Files that survive a kill in the middle of a write, and a disk that is full."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from study.spec.config import StudyError
from study.store.files import (
    MAX_LINE,
    append_lines,
    locked,
    read_lines,
    replaced_folder,
    write_text,
)
from study.store.mending import mend_lines

ROOT = Path(__file__).parents[3]


def test_what_was_appended_is_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_lines(path) == []
    append_lines(path, [{"number": 1}])
    append_lines(path, [{"number": 2}, {"number": 3}], durable=False)
    assert [row["number"] for row in read_lines(path)] == [1, 2, 3]


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_line_cut_anywhere_costs_itself_alone_and_not_the_next(tmp_path, cut):
    path = tmp_path / "rows.jsonl"
    append_lines(path, [{"number": 1}, {"number": 2}])
    os.truncate(path, path.stat().st_size - cut)
    assert read_lines(path) == [{"number": 1}]
    assert len(mend_lines(path, lambda _: None, "")) == 1
    append_lines(path, [{"number": 3}])
    assert read_lines(path) == [{"number": 1}, {"number": 3}]


def test_a_full_disk_takes_all_lines_or_none(tmp_path):
    """The kernel's limit on the size of files stands in for the disk: the write stops half way."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from study.store.files import append_lines\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); path = Path(sys.argv[1])\n"
        "append_lines(path, [{'number': 1}])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n    append_lines(path, [{'number': 2, 'long': 'x' * 200}])\n"
        "except OSError as error:\n    print('refused')\n"
        "append_lines(path, [{'number': 3}])"
    )
    path = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "refused\n", done.stderr
    assert [row["number"] for row in read_lines(path)] == [1, 3]


def test_a_text_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "summary.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \udc80")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_a_folder_is_replaced_as_a_whole_over_what_a_kill_left(tmp_path):
    target = tmp_path / "007"
    (tmp_path / ".007").mkdir()
    (tmp_path / ".007" / "half").touch()
    target.mkdir()
    (target / "stale").touch()
    with pytest.raises(OSError, match="full"), replaced_folder(target):
        raise OSError("the disk is full")
    assert [file.name for file in target.iterdir()] == ["stale"]
    with replaced_folder(target) as part:
        (part / "masks").write_text("masks")
    assert [file.name for file in target.iterdir()] == ["masks"]
    assert [path.name for path in tmp_path.iterdir()] == ["007"]


def test_two_drivers_do_not_share_a_folder_and_a_dead_one_holds_nothing(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from study.store.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(StudyError, match="Another process is at work"), locked(tmp_path):
        pass
    other.kill()
    other.wait()
    other.stdout.close()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["long", "nested", "NUL", "many values", "pipe", "huge", "digits"])
def test_records_of_strangers_cost_a_sentence(tmp_path, kind):
    path = tmp_path / "rows.jsonl"
    append_lines(path, [{"number": 1}])
    odd = {
        "long": b"x" * (MAX_LINE + 5) + b"\n",
        "nested": b"[" * 100_000 + b"\n",
        "NUL": bytes(1000) + b"\n",
        "many values": b"[" + b"1," * 600_000 + b"1]\n",
        "digits": b'{"a": ' + b"7" * 5000 + b"}\n",
    }
    if kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "huge":
        os.truncate(path, 3 * 2**30)
    else:
        with path.open("ab") as file:
            file.write(odd[kind])
        append_lines(path, [{"number": 2}])
    with pytest.raises(StudyError) as caught:
        read_lines(path)
    assert len(str(caught.value)) < 500
    if kind in odd:
        (note,) = mend_lines(path, lambda _: None, "{} is lost")
        assert "is lost" in note
        assert [row["number"] for row in read_lines(path)] == [1, 2]
        assert path.with_name("rows.jsonl.damaged").read_bytes() == odd[kind]


def test_not_every_lost_line_is_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\nx\n" * 500 + b"{")
    notes = mend_lines(path, lambda _: None, "{} is lost")
    assert len(notes) == 21
    assert "481 more lines" in notes[-1]
    assert path.read_bytes() == b"{}\n" * 500
    assert path.with_name("rows.jsonl.damaged").read_bytes() == b"x\n" * 500 + b"{\n"
