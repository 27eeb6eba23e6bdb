"""A suite of victims: what a file says, and what the command makes of it."""

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bimask.__main__ import app
from bimask.attacks import ATTACKS
from bimask.errors import SettingError
from bimask.victims import VictimSpec, VictimSuite, load_suite, load_victim

ROOT = Path(__file__).parents[3]
HASTY = {"image_size": 8, "width": 2, "epochs": 1, "min_clean_accuracy": 0, "min_attack_success": 0}


def test_every_victim_meets_every_combination_and_its_own_keys_come_first():
    suite = VictimSuite(
        common={"epochs": 3, "lr": 0.01},
        each={"seed": [0, 1], "width": [2, 4]},
        victims=[{"attack": {"name": "sig"}}, {"poisoning_rate": 0, "epochs": 5}],
    )
    specs = suite.specs()
    wanted = [
        VictimSpec(lr=0.01, seed=seed, width=width, **own)
        for own in ({"epochs": 3, "attack": {"name": "sig"}}, {"epochs": 5, "poisoning_rate": 0})
        for seed in (0, 1)
        for width in (2, 4)
    ]
    assert list(specs.values()) == wanted
    assert next(iter(specs)) == "digits-sig, seed 0, width 2"
    assert list(specs)[-1] == "digits-clean, seed 1, width 4"


def test_victims_of_the_same_attack_are_told_apart():
    specs = VictimSuite(victims=[{}, {"lr": 0.01}]).specs()
    assert list(specs) == [f"digits-badnets ({spec.digest[:6]})" for spec in specs.values()]
    assert len(specs) == 2


def test_all_problems_are_told_at_once(tmp_path):
    path = tmp_path / "suite.yaml"
    suite = {"each": {"seed": [0, -1]}, "victims": [{"epochs": 0}, {"seed": 3}, {"colour": 1}, {}, {}]}
    path.write_text(yaml.safe_dump(suite))
    with pytest.raises(SettingError) as caught:
        load_suite(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: victims") for line in lines)
    for words in (
        r"victims.0 \(seed 0\): epochs: .*got 0",
        r"victims.0 \(seed -1\): .*seed: .*got -1",
        "victims.1: 'seed' is in `each` as well",
        r"victims.2 \(seed 0\): colour: extra",
        r"victims.3 \(seed -1\): seed: ",
        "victims: digits-badnets, seed 0 is listed twice",
    ):
        assert any(re.search(words, line) for line in lines), words


@pytest.mark.parametrize(
    "text", ["[1, 2]", "victims: []", "victims: [{}]\nseeds: [0]", "{", "victims: 3"]
)
def test_a_file_that_is_no_suite_is_refused(tmp_path, text):
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(SettingError, match=str(path)):
        load_suite(path)


def test_the_suite_that_is_shipped_has_every_attack_and_a_control():
    specs = load_suite(ROOT / "victims" / "digits.yaml").values()
    assert {spec.attack["name"] for spec in specs if not spec.is_control} == set(ATTACKS)
    assert any(spec.is_control for spec in specs)


@pytest.fixture
def command(tmp_path):
    """A suite -> exit code and what was said, on one line."""

    def run(suite):
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump(suite))
        done = CliRunner().invoke(app, ["train-victims", str(path), "--out", str(tmp_path / "out")])
        return done.exit_code, " ".join(done.output.split())

    return run


def test_one_that_fails_stops_no_other_and_what_is_there_is_found(command, tmp_path):
    bad = {"attack": {"name": "sig"}, "poisoning_rate": 0.5}
    code, said = command({"common": HASTY, "victims": [bad, {}, {"poisoning_rate": 0}]})
    assert code == 1
    assert "digits-sig: failed, DataError: A poisoning rate of 0.5" in said
    assert said.endswith("1 of 3 victims failed: digits-sig")
    folders = sorted((tmp_path / "out").iterdir())
    digests = {load_victim(folder).spec.digest for folder in folders}
    assert digests == {VictimSpec(**HASTY).digest, VictimSpec(**HASTY, poisoning_rate=0).digest}
    written = {folder: folder.stat().st_mtime_ns for folder in folders}
    code, said = command({"common": HASTY, "victims": [{}, {"poisoning_rate": 0}]})
    assert code == 0
    assert said.count(": found, ") == 2
    assert {folder: folder.stat().st_mtime_ns for folder in folders} == written
