"""A study on Ray nodes of this machine, and what disturbs it while it runs.

A trial here takes six rounds, and its state is kept after each; what disturbs it waits until it stands
at a chosen one.
"""

import functools
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import optuna
import pytest
import ray
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

import study as study_package
from bimask.victims import obtain_victim
from study import search
from study.spec.config import StudyConfig
from study.store import records
from study.tracking.mlflow_runs import Tracker, tracking_uri
from study.tracking.recorder import Recorder
from study.trial.cases import Case
from study.trial.run import run_trials

STUDY = {
    "name": "faults",
    "clean_images_per_class": 2,
    "report_every": 2,
    "checkpoint_every": 1e-6,
    "retries": 2,
    "victims": [
        {
            "dataset": "digits",
            "image_size": 12,
            "net": "small_resnet",
            "width": 4,
            "attack": {"name": "badnets"},
            "epochs": 6,
        }
    ],
    "reference_point": {"clean_accuracy": 0.3, "attack_success": 1.0},
    "fixed": {
        "inner_optimizer": "sign",
        "step_size": None,
        "patience": None,
        "initialise_rounds": 2,
        "minimise_rounds": 2,
        "select_rounds": 2,
    },
    "space": {
        "mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True},
        "inner_steps": {"kind": "int", "low": 1, "high": 2},
    },
}
PATIENCE = 300  # seconds that something which must happen may take on a busy machine


def descendants(pid):
    """A process and all that it has started, as far as they live."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += descendants(int(child))
    return found


def stopping(plan, marks):
    """What runs a trial as it is, but stops some of them, once, where they are told to.

    A trial that stops names its node in `marks`/NUMBER and waits for `marks`/NUMBER.go; `marks`/starts
    gets a line for each start of a trial: its number, and how many states it finds.

    Args:
        plan: number -> the states that are kept of it before it stops; where that is negative its
            process ends there, as by the kernel where memory runs out.
    """

    def run(group, *, study, cases):
        import ray

        from study.search import actor
        from study.trial import checkpoint

        (member,) = group["members"]
        number, kept = member["number"], 0
        states = list(Path(group["checkpoint"]).glob("*.safetensors"))
        with (marks / "starts").open("a") as file:
            file.write(f"{number} {len(states)}\n")
        if member["preset"]:  # the paper's defaults take longer than all the others
            member = member | {"preset": None, "parameters": {}}
        keep = checkpoint.TrialCheckpoint.keep

        def keep_and_stop(place):
            nonlocal kept
            keep(place)
            kept += 1
            if states or kept != abs(plan.get(number, 0)):
                return
            (marks / f".{number}").write_text(ray.get_runtime_context().get_node_id())
            (marks / f".{number}").rename(marks / str(number))
            if plan[number] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            while not (marks / f"{number}.go").exists() and not (marks / "given-up").exists():
                time.sleep(0.05)

        checkpoint.TrialCheckpoint.keep = keep_and_stop
        try:
            actor.trainable(group | {"members": [member]}, study=study, cases=cases[:1])
        finally:
            checkpoint.TrialCheckpoint.keep = keep  # actors are used again

    return run


class Disturbed:
    """A study on `nodes` nodes of one CPU each, while `disturb(it)` runs beside it in a thread."""

    def __init__(self, place, *, trials, plan, node=None, ballast=(), storage=None):
        self.outputs, self.marks = place / "outputs", place / "marks"
        self.plan, self.ballast, self.storage = plan, ballast, storage
        self.node = {"num_cpus": 1} | (node or {})
        self.config = StudyConfig.model_validate(STUDY | {"trials": trials})
        self.folder = self.outputs / self.config.name
        victim = obtain_victim(self.config.victims[0], self.outputs / "victims")
        self.case = Case.of("digits-badnets", victim, self.config)
        self.folder.mkdir()
        self.marks.mkdir()

    def run(self, disturb, *, nodes=3):
        self.cluster = Cluster(initialize_head=True, head_node_args=self.node | {"num_cpus": 0})
        try:
            for _ in range(nodes):
                self.cluster.add_node(**self.node)
            self.cluster.wait_for_nodes()
            ray.init(address=self.cluster.address, log_to_driver=False)
            with ThreadPoolExecutor(1) as beside:
                disturbing = beside.submit(self._beside, disturb)
                self._search()
                disturbing.result(PATIENCE)
        finally:
            ray.shutdown()
            self.cluster.shutdown()
        lines = (self.marks / "starts").read_text().splitlines()
        self.starts = [tuple(map(int, line.split())) for line in lines]

    def _beside(self, disturb):
        try:
            disturb(self)
        except BaseException:
            (self.marks / "given-up").touch()  # nobody waits for it
            raise

    def _search(self):
        tracker = Tracker(tracking_uri(self.outputs), self.outputs / "mlartifacts")
        tracker.start_study(self.config.name, {}, {})
        recorder = Recorder(self.config, self.folder, tracker, {}, lambda *_: None)
        search.run_search(
            self.config,
            [self.case, *self.ballast],
            recorder,
            folder=self.folder,
            concurrency=3,
            storage=self.storage,
            function=stopping(self.plan, self.marks),
        )

    def add_node(self, **more):
        self.cluster._shutdown_at_exit = False  # that takes signal handlers, which no thread may set
        return self.cluster.add_node(**self.node, **more)

    @staticmethod
    def until(holds):
        """Wait for what must happen."""
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, "it never held"
            time.sleep(0.05)

    def node_of(self, number):
        """The node that a trial has stopped on."""
        self.until((self.marks / str(number)).exists)
        known = (self.marks / str(number)).read_text()
        (node,) = [node for node in self.cluster.worker_nodes if node.node_id == known]
        return node

    def go(self, number):
        (self.marks / f"{number}.go").touch()

    def records(self):
        """Number -> record, of the trials that have ended."""
        lines = (self.folder / records.TRIALS).read_text().splitlines()
        return {record["number"]: record for record in map(json.loads, lines)}

    def require_each_once(self):
        """All trials are complete and known once: to the records, to Optuna and to MLflow."""
        numbers = list(range(self.config.trials))
        trials = study_package.load("faults", self.outputs)
        assert trials["number"].tolist() == numbers
        assert set(trials["status"]) == {"COMPLETE"}
        storage = f"sqlite:///{self.folder / 'optuna.db'}"
        asked = optuna.load_study(study_name="faults", storage=storage).trials
        assert [trial.state.name for trial in asked] == ["COMPLETE"] * len(numbers)
        client = mlflow.MlflowClient(tracking_uri(self.outputs))
        experiment = client.get_experiment_by_name("bimask")
        runs = client.search_runs([experiment.experiment_id], "tags.trial != ''")
        assert sorted(int(run.data.tags["trial"]) for run in runs) == numbers
        assert {run.info.status for run in runs} == {"FINISHED"}
        for run in runs:
            curve = client.get_metric_history(run.info.run_id, "digits-badnets/attack_success")
            assert [point.step for point in curve] == [1, 3, 5, 6]

    def require_bits(self, *numbers):
        """Records and masks of trials are those of the same trials run here and left alone."""
        for number in numbers:
            record = self.records()[number]
            settings = self.config.defence_config(record["parameters"])
            (alone,) = run_trials([settings], [self.case], seed=self.config.seed)
            kept = load_file(
                self.folder / "trials" / f"{number:03d}" / "digits-badnets.masks.safetensors"
            )
            expected = alone.cases["digits-badnets"].tensors
            assert set(kept) == set(expected)
            for name, values in expected.items():
                assert (kept[name] == values).all(), (number, name)
            assert record["attack_success"] == alone.scores["attack_success"]

    def require_starts(self, again):
        """Those of `again` were started twice, and found their state; the others once."""
        found = {
            number: [n for start, n in self.starts if start == number]
            for number in range(self.config.trials)
        }
        assert found == {n: [0, 1] if n in again else [0] for n in found}


@pytest.fixture
def disturbed(tmp_path):
    """How many trials, which of them stop where -> a study that is about to run; `Disturbed`."""
    return functools.partial(Disturbed, tmp_path)


@pytest.fixture(name="descendants")
def _descendants():
    """A process's id -> it and all that it has started."""
    return descendants
