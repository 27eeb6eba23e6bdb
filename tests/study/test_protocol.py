"""`study.protocol` as a user runs it: bad input, its cost, and a whole one that is cut short."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import typer
import yaml
from typer.testing import CliRunner

from study.protocol import main

TINY = {
    "name": "tiny",
    "datasets": {
        "digits": {
            "dataset": "digits",
            "image_size": 12,
            "epochs": 6,
            "min_clean_accuracy": 0.0,
            "min_attack_success": 0.0,
        }
    },
    "nets": {name: {"net": "small_resnet", "width": width} for name, width in (("a", 3), ("b", 4))},
    "attacks": {
        "badnets": {"attack": {"name": "badnets"}},
        "blended": {"attack": {"name": "blended", "alpha": 0.3}},
    },
    "rates": [0.01, 0.1],
    "tuning": ["badnets"],
    "comparison": {
        "defences": ["clp", "ft_sam"],
        "published": ["clp"],
        "search_seconds": 4,
        "trials": 3,
        "budgets": [5],
        "clean_images_per_class": 5,
        "seeds": {"tuning": [0], "judged": [1]},
        "choose": {"max_accuracy_drop": 0.9},
        "settings": {"ft_sam": {"fixed": {"epochs": 4}}},
    },
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def run(*words):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def test_what_is_no_protocol_is_one_sentence_and_leaves_nothing(tmp_path, file):
    file.write_text(yaml.safe_dump(TINY | {"tuning": ["magic"]}))
    out = tmp_path / "out"
    for words in (
        [file, "--outputs", out],
        ["--resume", "nothing", "--outputs", out],
        ["--outputs", out],
        [tmp_path / "none.yaml", "--outputs", out],
        ["--dry-run", "--outputs", out],
        [file, "--tflops", "3", "--outputs", out],
    ):
        result = run(*words)
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output
    assert not list(out.iterdir())


def test_a_dry_run_says_what_it_would_cost_and_leaves_nothing(tmp_path, file):
    out = tmp_path / "out"
    result = run(file, "--dry-run", "--outputs", out, "--tflops", "0.001", "--dollars", "3600")
    assert result.exit_code == 0, result.output
    assert "8 cases, 12 victims, 30 runs of choices" in " ".join(result.output.split())
    total = next(line for line in result.output.splitlines() if "│ all" in line)
    cells = [cell.strip() for cell in total.strip("│ \n").split("│")]
    assert cells[2] == "12"
    hours = [float(cell.replace(",", "")) for cell in cells[3:7]]
    assert hours[1] == pytest.approx(2 * 2 * 4 / 3600, rel=0.1), "two tuned defences on each net"
    assert hours[3] == pytest.approx(sum(hours[:3]), rel=0.2)
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.ray
def test_a_protocol_that_is_cut_short_ends_as_one(tmp_path, file):
    outputs, log = tmp_path / "out", (tmp_path / "log").open("w")
    command = [sys.executable, "-m", "study.protocol", "--outputs", str(outputs)]

    def begin(*more):
        return subprocess.Popen([*command, *more], stdout=log, stderr=log, start_new_session=True)

    first = begin(str(file))
    end = time.monotonic() + 400
    while not (outputs / "tiny.digits.a" / "judged.jsonl").is_file() and first.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait(120) == 128 + signal.SIGTERM
    assert "go on with --resume tiny" in (tmp_path / "log").read_text()
    assert begin("--resume", "tiny").wait(600) == 0, (tmp_path / "log").read_text()[-3000:]

    found = json.loads((outputs / "tiny" / "protocol.json").read_text())
    assert (found["cases"], found["judged"]) == (8, 8)
    rows = pd.read_csv(outputs / "tiny" / "protocol.csv")
    assert len(rows) == 3 * (8 + 2), "three entries on eight cases and two twins"
    assert not rows.duplicated(["dataset", "net", "attack", "rate", "entry"]).any()
    assert set(rows.entry) == {"clp", "ft_sam", "clp-published"}
    page = (outputs / "tiny" / "protocol.html").read_text()
    assert "8 of 8 cases are judged" in page
    assert "http" not in page.replace("http-equiv", "")
