"""Trials that hang, eat the memory, die or report nonsense, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from study import search
from study.spec.config import StudyConfig
from study.store import records
from study.tracking.mlflow_runs import Tracker, tracking_uri
from study.tracking.recorder import Recorder
from study.trial.limits import (
    DAY,
    KNOWN,
    LEAST,
    STACK,
    TIMES,
    default_timeout,
    projected_timeout,
    too_long,
    where_it_hung,
)

ROOT = Path(__file__).parents[3]
HANGS, SWELLS, DIES, RAISES, OVERFLOWS, SAYS_NOTHING = range(1, 7)  # trials' numbers


def run(code, folder):
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT
    )


LIMITED = """
import sys, time
from pathlib import Path
from study.trial.limits import time_limit
place = Path(sys.argv[1])
with time_limit(0.5, place / "in time"):
    pass
with time_limit(None, place / "no"):
    pass
time.sleep(1)
print("alive", flush=True)
source = "def hang():\\n    return 3 ** (10 ** 9) % 7\\nhang()"
with time_limit(0.5, place / "hung"):
    exec(compile(source, "study/search/actor.py", "exec"))
"""


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """A process that ends twice in time and then hangs, and its folders."""
    place = tmp_path_factory.mktemp("limited")
    return run(LIMITED, place), place


def test_code_that_never_comes_back_is_ended_and_says_where_it_was(limited):
    """One huge power, so that no Python thread gets a turn; the file is named as an actor's."""
    done, place = limited
    assert done.returncode == 1
    assert where_it_hung(place / "hung") == "study/search/actor.py, line 2, in hang"


def test_what_ends_in_time_is_left_alone(limited):
    done, place = limited
    assert done.stdout == "alive\n"
    assert not (place / "in time" / STACK).exists()
    assert not (place / "no").exists()
    assert where_it_hung(place / "in time") is None


def test_memory_beyond_the_limit_is_an_error_of_the_trial_alone(tmp_path):
    code = (
        "import torch; from study.trial.limits import memory_limit\n"
        "held = torch.ones(2**26)\n"  # 256 MiB that the process has already
        "with memory_limit(0.5):\n"
        "    torch.ones(2**25).sum()\n"
        "    try:\n        torch.ones(2**28)\n"
        "    except RuntimeError as error:\n        print('memory' in str(error))\n"
        "print(len(torch.ones(2**28)))"
    )
    done = run(code, tmp_path)
    assert done.stdout.split() == ["True", str(2**28)], done.stderr


def misbehaving(group, *, study, cases):
    """Trials that fail, each in its way; the others end at once, as they should."""
    import os
    import signal
    import tempfile
    import time

    import torch
    from ray import tune

    (member,) = group["members"]
    number = member["number"]
    scores = {"clean_accuracy": 0.9, "attack_success": 0.1, "recovery": 0.8}
    if number == HANGS:
        time.sleep(10_000)
    if number == SWELLS:
        torch.ones(2**31)
    if number == DIES:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == RAISES:
        raise ValueError("deliberately bad")
    if number == OVERFLOWS:
        scores["clean_accuracy"] = float("nan")
    if number == SAYS_NOTHING:
        del scores["attack_success"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / str(number)).mkdir()
        passes = {"forward": 0, "backward": 0}
        report = {"number": number, **scores, "scores": {}, "seconds": 0.0, "rounds": 0}
        tune.report(
            {"final": True, "members": [{**report, "passes": passes, "device": "cpu"}]},
            checkpoint=tune.Checkpoint.from_directory(folder),
        )


@pytest.mark.ray
def test_trials_that_go_wrong_are_failed_with_their_reason_and_the_study_goes_on(
    tmp_path, with_store, monkeypatch
):
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # the machine may be full of others
    config = StudyConfig(
        name="limits",
        trials=8,
        retries=0,
        concurrency=1,
        sampler="random",
        trial_timeout=3,
        memory_per_trial=1,
        victims=[{"dataset": "digits", "net": "small_resnet", "attack": {"name": "badnets"}}],
        reference_point={"clean_accuracy": 0.1, "attack_success": 1.0},
        space={"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3}},
    )
    tracker = Tracker(tracking_uri(with_store(tmp_path)), tmp_path / "mlartifacts")
    tracker.start_study("limits", {}, {})
    recorder = Recorder(config, tmp_path, tracker, {}, lambda *_: None)
    search.start_ray("local")
    try:
        search.run_search(config, [], recorder, folder=tmp_path, concurrency=1, function=misbehaving)
    finally:
        search.stop_ray()
    tracker.end_study(metrics={}, artifacts=[])
    lines = (tmp_path / records.TRIALS).read_text().splitlines()
    found = {record["number"]: record for record in map(json.loads, lines)}
    assert sorted(found) == list(range(8))
    failed = {number: r["reason"] for number, r in found.items() if r["status"] == "FAILED"}
    assert sorted(failed) == list(range(1, 7))
    assert "took longer than `trial_timeout` allows (3 s); it was at" in failed[HANGS]
    assert "memory" in failed[SWELLS]
    assert failed[DIES]
    assert "ValueError: deliberately bad" in failed[RAISES]
    assert "nan" in failed[OVERFLOWS]
    assert "'attack_success': None" in failed[SAYS_NOTHING]
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    trials = optuna.load_study(study_name="limits", storage=storage).get_trials()
    states = {trial.number: trial.state.name for trial in trials}
    assert states == {n: "FAIL" if n in failed else "COMPLETE" for n in range(8)}
    runs = tracker.client.search_runs(
        [tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.parent_id}'"
    )
    ends = {int(child.data.tags["trial"]): child for child in runs}
    for number in range(8):
        assert ends[number].info.status == ("FAILED" if number in failed else "FINISHED")
        assert ends[number].data.tags.get("reason") == failed.get(number)


def test_without_a_limit_a_trial_has_many_times_what_others_took():
    assert default_timeout([]) == default_timeout([9.0] * (KNOWN - 1)) == DAY
    assert default_timeout([9.0] * KNOWN) == LEAST
    assert default_timeout([1.0, *[9.0] * KNOWN, 500.0]) == TIMES * 500.0


@pytest.mark.parametrize(
    ("limit", "spent", "left", "ends"),
    [
        (None, 1e9, 1e9, False),
        (60, 5.9, 1e9, False),  # too early to say
        (60, 6, 109, True),  # twice the 54 s that are there are 108
        (60, 6, 108, False),
        (60, 50, 20, False),
        (60, 50, 21, True),
        (60, 70, 0, False),  # it has ended
    ],
)
def test_what_would_take_far_longer_than_its_limit_is_ended(limit, spent, left, ends):
    said = projected_timeout(limit, spent=spent, left=left)
    assert (said is not None) == ends
    if ends:
        assert f"after {spent} s it would take {left} s more" in said


def test_a_group_is_given_the_seconds_of_its_members(tmp_path):
    config = StudyConfig(
        name="limits",
        trials=8,
        repeats=3,
        trials_per_actor=2,
        sampler="random",
        victims=[{"dataset": "digits", "net": "small_resnet", "attack": {"name": "badnets"}}],
        reference_point={"clean_accuracy": 0.1, "attack_success": 1.0},
        space={"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3}},
    )

    def limits(config, took):
        searcher = search.ParetoSearch(config, None)
        searcher.took = {"ims": took}
        return [searcher.suggest(str(group))["limit"] for group in range(2)]

    known = [1000.0] * KNOWN
    assert limits(config, []) == [2 * 3 * DAY] * 2
    assert limits(config, known) == [2 * 3 * DAY, 2 * 3 * TIMES * 1000.0], (
        "the paper's trial comes first"
    )
    given = config.model_copy(update={"trial_timeout": 7.0})
    assert limits(given, known) == [2 * 7.0] * 2
    assert "set `trial_timeout`" in too_long(600, None, given=False)
