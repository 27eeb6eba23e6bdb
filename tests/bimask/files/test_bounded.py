"""YAML, JSON and safetensors of strangers cost a sentence: no traceback, no hang, no memory."""

import json
import os

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from typer.testing import CliRunner

from bimask.__main__ import app
from bimask.defences import settings_from
from bimask.defences.state import DefenceState
from bimask.errors import BimaskError, SettingError, VictimError
from bimask.files.atomic import parsed_manifest
from bimask.files.bounded import (
    MAX_DEPTH,
    dump_yaml,
    parsed_json,
    read_json,
    read_yaml,
    require_rereadable,
)
from bimask.files.tensors import MAX_TENSORS, load_tensors
from bimask.nets.weights import read_weights
from bimask.victims import load_suite
from bimask.victims.training_state import Checkpoint
from study.spec.config import StudyError
from study.spec.reading import load_config

TENS = ", ".join(["*a{0}"] * 10)
HOSTILE = {
    "deep": "a: " + "[" * 100_000,
    "deep closed": "a: " + "[" * 500 + "]" * 500,
    "deep block": "\n".join(" " * i + "a:" for i in range(700)),
    "deep by aliases": "a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 2000)),
    "in itself": "a: &a [*a]",
    "laughs": "a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [{TENS.format(i - 1)}]" for i in range(1, 10)),
    "laughs merged": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{i}: &a{i} {{<<: [{TENS.format(i - 1)}]}}" for i in range(1, 10)),
    "large": "a: '" + "x" * 600_000 + "'",
    "digits": "a: " + "7" * 5_000,
    "base 60": "a: 1" + ":1" * 100_000,
    "no date": "a: 2001-13-45",
    "no number": "a: !!int x",
    "no flag": "a: !!bool x",
    "no time": "a: !!timestamp x",
    "object": "a: !!python/object/apply:os.system [touch RUN]",
    "keys": "{1: a, 2: b}",
    "key of lists": "? [a]\n: b",
    "control": "a: \x1b]0;x",
    "latin": b"a: \xe9",
    "utf-16": "a: b".encode("utf-16"),
    "a scalar": "x",
    "nothing": "",
    "cut": "a: [",
    "tabs": "a:\n\t- b",
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(content):
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "a.yaml").write_bytes(raw)
        return tmp_path / "a.yaml"

    return write


@pytest.mark.parametrize("kind", HOSTILE)
def test_every_reader_of_yaml_refuses_in_a_sentence(written, kind):
    path = written(HOSTILE[kind])
    for read in (settings_from, load_suite, load_config):
        with pytest.raises(SettingError if read is not load_config else StudyError) as caught:
            read(path)
        assert len(str(caught.value)) < 2_000
    if kind != "nothing":
        done = CliRunner().invoke(app, ["train-victim", str(path)])
        assert isinstance(done.exception, BimaskError), repr(done.exception)
    assert not os.path.exists("RUN")


@pytest.mark.parametrize("read", [settings_from, load_suite, load_config, read_json, parsed_manifest])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(tmp_path, read, kind):
    path = tmp_path / "a.yaml"
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda p: os.symlink("/dev/zero", p)}
    make[kind](path)
    with pytest.raises((BimaskError, OSError), match="not a regular file"):
        read(path)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("1e-1", 0.1), ("1E+2", 100.0), ("-2.5e3", -2500.0), (".5e1", 5.0), ("1.e2", 100.0)),
        *(("0.1", 0.1), ("1.0e-05", 1e-5), ("3", 3), ("0x1e5", 0x1E5), (".inf", float("inf"))),
    ],
)
def test_numbers_are_those_of_yaml_1_2(written, text, number):
    found = read_yaml(written(f"a: {text}\nb: [{text}]\nc: {text}x"))
    assert found["a"] == found["b"][0] == number
    assert type(found["a"]) is type(number)
    assert isinstance(found["c"], str)


def test_text_that_looks_like_a_number_is_written_in_quotes(written):
    content = {"a": "1e5", "b": "12e3", "c": 1e-7, "d": "yes", "e": [0.1, None], "f": "1e5x"}
    assert read_yaml(written(dump_yaml(content))) == content


def test_what_was_read_before_is_read_as_before(written):
    text = "a: &a {x: 1, y: [1.5, -3, 0.02, true, null, 'q']}\nb: {<<: *a, z: 2001-01-02}\nc: *a"
    assert read_yaml(written(text)) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested deeper than"),
        (b'{"a": ' * 60 + b"1" + b"}" * 60, "nested deeper than"),
        (b"[" + b"[]," * 3_000_000 + b"1]", "at most 2000000 are read"),
        (b"9" * 200, "a number of 200 digits"),
        (b'"\xff"', "utf-8"),
        (b"\0" * 100, "Expecting value"),
    ],
)
def test_json_is_bounded(content, reason):
    with pytest.raises(ValueError, match=reason):
        parsed_json(content)


def test_a_suite_is_bounded_before_it_is_made(written):
    suite = {"each": {f"k{i}": list(range(100)) for i in range(8)}, "victims": [{}]}
    with pytest.raises(SettingError, match="makes 10000000000000000 victims of 1, but"):
        load_suite(written(yaml.safe_dump(suite)))


def test_not_every_problem_is_told(written):
    many = {f"key{i}": i for i in range(20_000)}
    with pytest.raises(StudyError, match=r"and \d+ more problems") as caught:
        load_config(written(yaml.safe_dump(many)))
    assert len(str(caught.value)) < 5_000


def test_tensors_are_counted_in_the_header(tmp_path):
    one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for count, refused in ((20_001, "at most 20000"), (200_000, "a header of")):
        header = json.dumps({f"t{i}": one for i in range(count)}).encode()
        (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(SafetensorError, match=refused):
            load_tensors(tmp_path / "w")
        with pytest.raises(VictimError, match="cannot be read as plain tensors"):
            read_weights(tmp_path / "w")
    save_file({"a": torch.ones(2)}, tmp_path / "w", metadata={"m": json.dumps({"b": [1]})})
    assert torch.equal(load_tensors(tmp_path / "w")["a"], torch.ones(2))


def test_what_is_written_can_be_read_again(written):
    for content in ({"a": [{"b": [0, None]}] * 100}, {f"k{i}": "x" * 100 for i in range(3000)}):
        require_rereadable(content)
        assert read_yaml(written("# a comment\n" + dump_yaml(content))) == content
    for content in ({"a": [[0] * 10 for _ in range(5000)]}, {f"k{i}": "x" * 100 for i in range(6000)}):
        with pytest.raises(ValueError, match="more than 50000 values|bytes, but at most"):
            require_rereadable(content)
        with pytest.raises(ValueError, match="more than|at most"):
            read_yaml(written(dump_yaml(content)))


@pytest.mark.parametrize("kind", ["nested", "digits", "no list", "pipe", "header", "device"])
def test_states_of_runs_are_bounded(tmp_path, kind):
    """Of a defence and of a training: what is kept between two steps."""
    path, about = tmp_path / "state", {"nested": "[" * 10**5, "no list": '{"members": 7, "seconds": 1}'}
    text = about.get(kind, "7" * 5000)
    save_file({"a": torch.ones(2)}, path, metadata={"population": text, "numbers": text, "key": "k"})
    if kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "device":
        path.unlink()
        path.symlink_to("/dev/zero")
    elif kind == "header":
        path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(SettingError, match="holds no state of a defence"):
        DefenceState.load(path)
    if kind != "no list":
        assert Checkpoint(path, "k").load() is None


def test_a_state_is_read_back(tmp_path):
    many = {f"{i}/a": torch.ones(1) for i in range(MAX_TENSORS + 1)}  # of many members
    state = DefenceState(many, [{"history": list(range(10))}], 1.5)
    state.save(tmp_path / "state")
    again = DefenceState.load(tmp_path / "state")
    assert (len(again.tensors), again.members, again.seconds) == (len(many), state.members, 1.5)
    kept = Checkpoint(tmp_path / "training", "k")
    kept.save({"a": torch.ones(2)}, {"epoch": 3})
    assert kept.load()[1] == {"epoch": 3}
    assert Checkpoint(tmp_path / "training", "other").load() is None
