"""What one driver carries: `python -m benchmarks.scale [--trials 1000] [--nodes 4]`.

Trials that do nothing, through the whole of `study.search`: Optuna's suggestions, Ray's actors on small
nodes, records, MLflow. Measured are seconds a trial, the driver's memory and CPU a trial, the time of a
suggestion as the history grows, and what MLflow takes a second. Prints a table, adds a row
to benchmarks/results/scale/ and writes benchmarks/driver.md; docs/scaling.md says what follows.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from ray import tune
from ray.cluster_utils import Cluster
from rich.progress import Progress
from rich.table import Table

from benchmarks import report
from benchmarks.pages.driver import KEPT
from bimask.progress import Console
from study import search
from study.spec.config import StudyConfig
from study.store.provenance import commit, versions
from study.store.schema import Group, TrialRecord
from study.tracking.mlflow_runs import Tracker, tracking_uri
from study.tracking.recorder import Recorder

WINDOW = 20  # suggestions that are averaged at a point of the history
STUDY: dict[str, Any] = {
    "name": "scale",
    "victims": [{"dataset": "digits", "net": "small_resnet", "attack": {"name": "badnets"}}],
    "reference_point": {"clean_accuracy": 0.5, "attack_success": 1.0},
    "space": {  # as many as the digits study searches
        "universal": {"kind": "float", "low": 0.0, "high": 1.0},
        "warm_start": {"kind": "float", "low": 0.0, "high": 1.0},
        "budget": {"kind": "float", "low": 0.12, "high": 0.8, "log": True},
        "inner_steps": {"kind": "int", "low": 1, "high": 3},
        "mask_lr": {"kind": "float", "low": 0.05, "high": 0.15, "log": True},
        "selection_weight": {"kind": "float", "low": 0.6, "high": 4, "log": True},
        "clean_weight": {"kind": "float", "low": 1, "high": 10, "log": True},
        "sharpness": {"kind": "float", "low": 6, "high": 16, "log": True},
        "initial_selection": {"kind": "float", "low": 0.86, "high": 0.97},
        "initialise_rounds": {"kind": "int", "low": 5, "high": 20},
        "minimise_rounds": {"kind": "int", "low": 2, "high": 30},
        "select_rounds": {"kind": "int", "low": 20, "high": 50},
    },
}


def nothing(config: dict[str, Any], *, study: StudyConfig, cases: list[Any]) -> None:
    """A trial's reports and files without its work: scores made up of its settings."""
    members = []
    with tempfile.TemporaryDirectory() as folder:
        for member in config["members"]:
            number, parameters = member["number"], member["parameters"]
            scores = {
                "clean_accuracy": 1 - abs(parameters["budget"] - 0.4) / 2,
                "attack_success": parameters["mask_lr"] * 5 % 1,
                "recovery": 0.5,
            }
            (Path(folder) / str(number)).mkdir()
            (Path(folder) / str(number) / "victim.rounds.json").write_text("[]")
            members.append(
                {"number": number, "device": "cpu", "scores": {}, "seconds": 0.0, "rounds": 0}
                | {"passes": {"forward": 0, "backward": 0}, **scores}
            )
        kept = tune.Checkpoint.from_directory(folder)
        tune.report({"final": True, "members": members}, checkpoint=kept)


def resident() -> float:
    """This process's resident memory in KB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


class Clocked(search.ParetoSearch):
    """Notes how long a suggestion took at which length of the history."""

    taken: list[tuple[int, float]] = []  # noqa: RUF012  one search a process

    def suggest(self, trial_id: str) -> Group | str | None:
        started = time.thread_time()  # what a busy machine does not lengthen
        group = super().suggest(trial_id)
        if isinstance(group, dict):
            seconds = (time.thread_time() - started) / len(group["members"])
            self.taken.append((group["members"][0]["number"], seconds))
        return group


def mean_near(taken: list[tuple[int, float]], number: int) -> float | None:
    """Mean CPU seconds of the suggestions for the WINDOW trials up to a number."""
    near = [seconds for n, seconds in taken if number - WINDOW <= n < number]
    return sum(near) / len(near) if near else None


def measure(trials: int, nodes: int, sampler: str, group: int) -> dict[str, Any]:
    """Run a study of trials that do nothing on a cluster of small nodes on this machine."""
    config = StudyConfig.model_validate(
        STUDY | {"trials": trials, "sampler": sampler, "trials_per_actor": group}
    )
    growth: list[tuple[int, float]] = []
    from study.search import driver

    vars(driver)["ParetoSearch"] = Clocked
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    with tempfile.TemporaryDirectory() as place, Progress() as progress:
        outputs = Path(place)
        folder = outputs / config.name
        folder.mkdir()
        tracker = Tracker(tracking_uri(outputs), outputs / "mlartifacts")
        tracker.start_study(config.name, {}, {})
        task = progress.add_task(f"{sampler}, {group} a group", total=trials)

        def on_change(done: list[TrialRecord]) -> None:
            growth.append((len(done), resident()))
            progress.update(task, completed=len(done))

        recorder = Recorder(config, folder, tracker, {}, on_change)
        try:
            for _ in range(nodes):
                cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False)
            cpu = resource.getrusage(resource.RUSAGE_SELF)
            began = time.perf_counter()
            search.run_search(config, [], recorder, folder=folder, concurrency=nodes, function=nothing)
            wall = time.perf_counter() - began
            used = resource.getrusage(resource.RUSAGE_SELF)
        finally:
            ray.shutdown()
            cluster.shutdown()
        writing = mlflow_rate(tracker)
    complete = sum(record["status"] == "COMPLETE" for record in recorder.records)
    settled = growth[len(growth) // 5 :]  # past imports and first allocations
    return {
        "trials": trials,
        "complete": complete,
        "nodes": nodes,
        "sampler": sampler,
        "trials_per_actor": group,
        "seconds_a_trial": wall / trials,
        "driver_cpu_a_trial": (used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime) / trials,
        "driver_kb_a_trial": (settled[-1][1] - settled[0][1]) / (settled[-1][0] - settled[0][0]),
        "suggestion_cpu": {
            n: mean_near(Clocked.taken, n) for n in (100, 500, 1000, 5000) if n <= trials
        },
        "mlflow": writing,
    }


def mlflow_rate(tracker: Tracker, runs: int = 20) -> dict[str, float]:
    """Runs a second, and points of curves a second, that the store takes from one writer."""
    curve = {f"victim/{name}": [(i, 0.5) for i in range(100)] for name in ("a", "b", "c")}
    began = time.perf_counter()
    for number in range(10**6, 10**6 + runs):
        tracker.start_trial(number, {f"p{i}": i for i in range(30)}, {})
        tracker.end_trial(number, metrics={"x": 1.0}, histories=curve)
    seconds = time.perf_counter() - began
    return {"runs_a_second": runs / seconds, "points_a_second": runs * 300 / seconds}


def main(
    trials: Annotated[int, typer.Option(help="Trials that do nothing.")] = 1000,
    nodes: Annotated[int, typer.Option(help="Ray nodes of one CPU each.")] = 2,
    sampler: Annotated[str, typer.Option(help="As in a study.")] = "tpe",
    group: Annotated[int, typer.Option(help="trials_per_actor")] = 1,
) -> None:
    """Measure the driver; one row is added to the results."""
    before = os.getloadavg()[0]
    row = measure(trials, nodes, sampler, group)
    row |= {"load": [before, os.getloadavg()[0]], "cores": os.cpu_count(), "commit": commit()}
    row["versions"] = versions()
    rows = json.loads(KEPT.read_text()) if KEPT.is_file() else []
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps([*rows, row], indent=1) + "\n")
    report.write()
    table = Table("measured", "value")
    for key, value in row.items():
        if key != "versions":
            table.add_row(key, json.dumps(value))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
