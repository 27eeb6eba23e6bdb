"""Every example runs as it stands, in a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SAID = {
    "purify_a_model": "after: clean accuracy 0.9",
    "repair_a_detector": "attack success 0.0",
    "audit_a_model": "verdict:",
    "study_in_python": "COMPLETE",
    "import_and_export": "after: clean accuracy 0.9",
    "write_a_defence": "attack success",
}

SLOW = {"repair_a_detector": pytest.mark.slow}  # it trains a detector


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all: the victim is trained once."""
    return tmp_path_factory.mktemp("examples")


def test_all_are_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SAID, "common"}


@pytest.mark.parametrize("name", [pytest.param(one, marks=SLOW.get(one, ())) for one in SAID])
def test_an_example_runs(name, folder):
    env = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=folder,
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert SAID[name] in done.stdout
