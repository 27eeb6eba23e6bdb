"""The table at a study's end, at any width of the terminal."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from rich.table import Table

from bimask.progress import Console
from study.report.console import fitting, show
from study.spec.reading import load_config
from study.store.databases import sqlite_path
from study.store.records import read_summary
from study.tracking.mlflow_runs import Tracker, tracking_uri

OLD = Path(__file__).parents[1] / "store" / "schema_1"
POINTS = [
    {"a_long_name": 0.1, "same": 3, "b": 1, "kind": "sign"},
    {"a_long_name": 0.4, "same": 3, "b": 2, "kind": "adamw"},
]
NAMES = ["a_long_name", "same", "b", "kind", "absent"]


def test_all_settings_are_shown_where_they_fit_in_their_order():
    assert fitting(NAMES, POINTS, 100) == NAMES


@pytest.mark.parametrize(
    ("room", "shown"),
    [
        (8, ["kind"]),  # words that differ come first
        (22, ["a_long_name", "kind"]),  # then 0.1 to 0.4
        (26, ["a_long_name", "b", "kind"]),  # then 1 to 2
        (0, []),
    ],
)
def test_those_that_differ_most_are_shown_whole_where_not_all_fit(room, shown):
    assert fitting(NAMES, POINTS, room) == shown


def test_no_point_and_no_setting_are_no_trouble():
    assert fitting([], POINTS, 10) == []
    assert fitting(["b"], [], 10) == ["b"]


def test_no_header_is_cut_on_a_narrow_terminal(large_study, capsys):
    """The front of a real study, printed 80 characters wide."""
    front = json.loads((large_study / "summary.json").read_text())["front"]
    points = [trial["parameters"] for trial in front]
    names = list(dict.fromkeys(name for point in points for name in point))
    shown = fitting(names, points, 40)
    assert 0 < len(shown) < len(names)
    table = Table("trial *", *shown)
    for point in points:
        table.add_row("1", *(f"{point.get(name, '')}"[:4] for name in shown))
    Console(width=40 + 10 + 1).print(table)
    printed = capsys.readouterr().out
    assert all(name in printed for name in shown)
    assert "…" not in printed


def test_what_is_printed_to_copy_is_whole_and_quoted(tmp_path, with_store, capsys):
    """In a folder whose name is markup to rich and three words to a shell."""
    outputs = with_store(tmp_path / "my [red]old[/] $HOME; x")
    shutil.copytree(OLD / "old", outputs / "old")
    (outputs / "old" / "report.html").touch()
    tracker = Tracker(tracking_uri(outputs), outputs / "mlartifacts")
    config, summary = load_config(outputs / "old" / "study.yaml", {}), read_summary(outputs / "old")
    console = Console(width=140)
    show(console, config, summary, tracker, outputs / "victims", outputs / "old")
    lines = capsys.readouterr().out.splitlines()
    said = {line.split(":")[0]: line.partition(":")[2].strip() for line in lines}
    assert said["page"] == str(outputs / "old" / "report.html")
    reuse = shlex.split(said["reuse"])
    assert reuse[reuse.index("--config") + 1] == str(outputs / "old" / "best.yaml")
    assert reuse[reuse.index("--out") + 1] == str(outputs / "old" / "cleaned")
    victim = reuse[reuse.index("--victim") + 1]
    assert victim.startswith(f"{outputs / 'victims'}/")
    look = shlex.split(said["look"])
    assert sqlite_path(look[-1]) == outputs / "mlflow.db"


def test_of_several_defences_a_row_has_its_defence_and_the_settings_of_that(
    two_defences, with_store, tmp_path, capsys
):
    outputs = with_store(tmp_path / "outputs")
    tracker = Tracker(tracking_uri(outputs), outputs / "mlartifacts")
    config, summary = load_config(two_defences / "study.yaml"), read_summary(two_defences)
    summary["selection"] = summary["selection"] | {"oracle": None, "blind": None}  # it was never asked
    show(Console(width=160), config, summary, tracker, outputs / "victims", two_defences)
    printed = capsys.readouterr().out
    assert "its settings" in printed
    for point in summary["front"]:
        name = point["parameters"]["defence"]
        (row,) = re.findall(rf"^│ +{point['number']}[ *]* │.*$", printed, re.M)
        assert f"│ {name} " in row
