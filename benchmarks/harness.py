"""What the harness of a study costs: Ray, Optuna, MLflow, records and files around the defence.

    python -m benchmarks.harness [--trials 8] [--seconds 10] [--noop 60]

Three measurements, each a real search with its records and its MLflow in SQLite: a trial that does
nothing (actors reused); the share of the workers' time that is not inside trials of some seconds, from
the first trial's start to the last one's end; and how much faster two workers are than one. Trials use
one thread each. The load of the machine is printed beside: on one that works for others as well, all of
it means little.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.purify import cpu_name
from bimask.victims import VictimSpec, obtain_victim
from study import search
from study.spec.config import StudyConfig
from study.store.schema import Group, Member, TrialRecord
from study.tracking.mlflow_runs import Tracker, tracking_uri
from study.tracking.queue import MlflowQueue
from study.tracking.recorder import Recorder
from study.trial.cases import Case

VICTIM = {
    "dataset": "digits",
    "net": "small_resnet",
    "width": 8,
    "attack": {"name": "badnets"},
    "epochs": 4,
    "min_clean_accuracy": 0.0,
    "min_attack_success": 0.0,
}
STUDY = {
    "name": "harness",
    "sampler": "random",
    "victims": [VICTIM],
    "reference_point": {"clean_accuracy": 0.1, "attack_success": 1.0},
    "fixed": {
        "inner_optimizer": "sign",
        "inner_steps": 2,
        "step_size": None,
        "patience": None,
        "initialise_rounds": 0,
        "minimise_rounds": 0,
    },
    "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.03}},
}
SCORES = {"clean_accuracy": 0.9, "attack_success": 0.1, "recovery": 0.8}


def nothing(group: dict[str, Any], *, study: StudyConfig, cases: list[Case]) -> None:
    """A trial that does nothing but leave what every trial leaves."""
    from ray import tune

    with tempfile.TemporaryDirectory() as folder:
        reports = []
        for member in group["members"]:
            files = Path(folder) / str(member["number"])
            files.mkdir()
            log = {"step": 0, "loss": 1.0, "losses": {"clean_agree": 1.0}}
            (files / "v.rounds.json").write_text(json.dumps([log]))
            passes = {"forward": 0, "backward": 0}
            report = {**SCORES, "scores": {"v": SCORES}, "passes": passes, "rounds": 1}
            reports.append({"number": member["number"], **report, "seconds": 0.0, "device": "cpu"})
        checkpoint = tune.Checkpoint.from_directory(folder)
        tune.report({"final": True, "members": reports}, checkpoint=checkpoint)


def usual(group: Group, *, study: StudyConfig, cases: list[Case]) -> None:
    """What an actor does anyway; trial 0 gets the settings of the others, since it counts like them."""
    members: list[Member] = [{**member, "preset": None} for member in group["members"]]
    for member in members:
        if not member["number"]:
            member["parameters"] = {}
    search.trainable({**group, "members": members}, study=study, cases=cases)


def searched(
    root: Path, cases: list[Case], *, trials: int, workers: int, rounds: int, function: Any
) -> list[TrialRecord]:
    """Run a search to its end: its records, in the order in which they ended."""
    raw = {**STUDY, "trials": trials, "concurrency": workers, "report_every": max(1, rounds // 5)}
    raw["fixed"] = {**STUDY["fixed"], "select_rounds": rounds}  # type: ignore[dict-item]
    config = StudyConfig.model_validate(raw)
    folder = Path(tempfile.mkdtemp(prefix="study-", dir=root))
    tracker = Tracker(tracking_uri(root), root / "mlartifacts")
    tracker.start_study(config.name, {}, {})
    mirror = MlflowQueue(tracker, lambda error: print(f"MLflow: {error}"))
    recorder = Recorder(config, folder, mirror, {}, lambda _: None)
    search.run_search(config, cases, recorder, folder=folder, concurrency=workers, function=function)
    mirror.end_study(metrics={}, artifacts=[])
    if mirror.close(lambda: 60) or any(r["status"] != "COMPLETE" for r in recorder.records):
        raise RuntimeError(f"Not all trials went well: {recorder.records[-1]}.")
    return recorder.records


def span(records: list[TrialRecord]) -> float:
    """Seconds from the first trial's start to the last one's end."""
    ended = [record["ended"] for record in records]
    return float(max(ended) - min(r["ended"] - r["seconds"] for r in records))


def measure(root: Path, *, trials: int, seconds: float, noop: int, workers: int) -> dict[str, Any]:
    """All three, in one Ray."""
    spec = VictimSpec.model_validate(VICTIM)
    config = StudyConfig.model_validate({**STUDY, "trials": 1})
    cases = [Case.of("digits", obtain_victim(spec, root / "victims"), config)]

    def run(count: int, at_once: int, rounds: int, function: Any = usual) -> list[TrialRecord]:
        return searched(root, cases, trials=count, workers=at_once, rounds=rounds, function=function)

    idle = run(noop, workers, 1, nothing)
    gaps = (idle[-1]["ended"] - idle[0]["ended"]) / (len(idle) - 1)
    (probe,) = run(1, 1, 50)
    rounds = max(1, round(50 * seconds / probe["seconds"]))
    one, many = run(trials, 1, rounds), run(trials * workers, workers, rounds)

    def inside(records: list[TrialRecord], at_once: int) -> float:
        return float(sum(r["seconds"] for r in records) / (at_once * span(records)))

    return {
        "noop_trial_seconds": gaps,
        "trial_seconds": sum(r["seconds"] for r in one) / len(one),
        "outside_share": {"1": 1 - inside(one, 1), str(workers): 1 - inside(many, workers)},
        "speedup": span(one) / len(one) / (span(many) / len(many)),
        "workers": workers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--trials", type=int, default=8, help="a worker")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a trial, about")
    parser.add_argument("--noop", type=int, default=60, help="trials that do nothing")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    given = parser.parse_args()
    load, begun = os.getloadavg(), time.perf_counter()
    search.start_ray("local")
    try:
        with tempfile.TemporaryDirectory(prefix="harness-") as root:
            found = measure(
                Path(root),
                trials=given.trials,
                seconds=given.seconds,
                noop=given.noop,
                workers=given.workers,
            )
    finally:
        search.stop_ray()
    found |= {"cpu": cpu_name(), "cores": os.cpu_count(), "seconds": time.perf_counter() - begun}
    found |= {"load_before": load[0], "load_after": os.getloadavg()[0]}
    print(f"a trial that does nothing   {found['noop_trial_seconds']:.3f} s")
    for workers, share in found["outside_share"].items():
        print(
            f"outside of trials           {100 * share:.1f} % of {workers} worker(s), trials of "
            f"{found['trial_seconds']:.1f} s"
        )
    print(f"{found['workers']} workers against one      {found['speedup']:.2f} x")
    print(
        f"load of the machine         {found['load_before']:.1f} before, {found['load_after']:.1f} "
        f"after, {found['cores']} cores"
    )
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
