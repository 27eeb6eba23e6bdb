"""Nodes and processes that die, freeze or run out of room: every trial ends once, with the same bits.

Real Ray nodes on this machine. A trial here takes six rounds, and its state is kept after each; what
disturbs it waits until it stands at a chosen one.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import mlflow
import numpy as np
import optuna
import pytest
import ray
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

import study as study_package
from bimask.victim import obtain_victim
from study import records, search
from study.config import StudyConfig
from study.tracking import Tracker, tracking_uri
from study.trial import Case, run_trials

pytestmark = [pytest.mark.ray, pytest.mark.slow]

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
END = 7  # states that are kept of a trial: one a round, and one when all is done
PATIENCE = 300  # seconds that something which must happen may take on a busy machine
# Ray declares a node dead that does not answer for about this long; its default is a minute.
QUICK = {"period_ms": 1000, "timeout_ms": 3000, "failure_threshold": 4}


def until(holds):
    deadline = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < deadline, "it never held"
        time.sleep(0.05)
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

        from study import checkpoint
        from study.search import actor

        (member,) = group["members"]
        number, kept = member["number"], 0
        states = list(Path(group["checkpoint"]).glob("*.safetensors"))
        with (marks / "starts").open("a") as file:
            file.write(f"{number} {len(states)}\n")
        if member["preset"]:  # the paper's defaults take longer than all the others
            member = member | {"preset": None, "parameters": {}}
        keep = checkpoint.Place._keep

        def keep_and_stop(place, population, path):
            nonlocal kept
            keep(place, population, path)
            kept += 1
            if states or kept != abs(plan.get(number, 0)):
                return
            (marks / f".{number}").write_text(ray.get_runtime_context().get_node_id())
            (marks / f".{number}").rename(marks / str(number))
            if plan[number] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            while not (marks / f"{number}.go").exists() and not (marks / "given-up").exists():
                time.sleep(0.05)

        checkpoint.Place._keep = keep_and_stop
        try:
            actor.trainable(group | {"members": [member]}, study=study, cases=cases[:1])
        finally:
            checkpoint.Place._keep = keep  # actors are used again

    return run


class Disturbed:
    """A study on `nodes` nodes of one CPU each, while `disturb(it)` runs beside it in a thread."""

    def __init__(self, place, *, trials, plan, node=None, ballast=()):
        self.outputs, self.marks = place / "outputs", place / "marks"
        self.plan, self.ballast = plan, ballast
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
        recorder = records.Recorder(self.config, self.folder, tracker, {}, lambda *_: None)
        search.run_search(
            self.config,
            [self.case, *self.ballast],
            recorder,
            folder=self.folder,
            concurrency=3,
            function=stopping(self.plan, self.marks),
        )

    def add_node(self, **more):
        self.cluster._shutdown_at_exit = False  # that takes signal handlers, which no thread may set
        return self.cluster.add_node(**self.node, **more)

    def node_of(self, number):
        """The node that a trial has stopped on."""
        until((self.marks / str(number)).exists)
        known = (self.marks / str(number)).read_text()
        (node,) = [node for node in self.cluster.worker_nodes if node.node_id == known]
        return node

    def go(self, number):
        (self.marks / f"{number}.go").touch()

    def records(self):
        """Number -> record, of the trials that have ended."""
        lines = (self.folder / records.TRIALS).read_text().splitlines()
        return {record["number"]: record for record in map(json.loads, lines)}


def require_each_once(ran):
    """All trials are complete and known once: to the records, to Optuna and to MLflow."""
    numbers = list(range(ran.config.trials))
    trials = study_package.load("faults", ran.outputs)
    assert trials["number"].tolist() == numbers
    assert set(trials["status"]) == {"COMPLETE"}
    storage = f"sqlite:///{ran.folder / 'optuna.db'}"
    asked = optuna.load_study(study_name="faults", storage=storage).trials
    assert [trial.state.name for trial in asked] == ["COMPLETE"] * len(numbers)
    client = mlflow.MlflowClient(tracking_uri(ran.outputs))
    experiment = client.get_experiment_by_name("bimask")
    runs = client.search_runs([experiment.experiment_id], "tags.trial != ''")
    assert sorted(int(run.data.tags["trial"]) for run in runs) == numbers
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        curve = client.get_metric_history(run.info.run_id, "digits-badnets/attack_success")
        assert [point.step for point in curve] == [1, 3, 5, 6]


def require_bits(ran, *numbers):
    """Records and masks of trials are those of the same trials run here and left alone."""
    for number in numbers:
        record = ran.records()[number]
        settings = ran.config.purify_config(record["parameters"])
        (alone,) = run_trials([settings], [ran.case], seed=ran.config.seed)
        kept = load_file(ran.folder / "trials" / f"{number:03d}" / "digits-badnets.masks.safetensors")
        expected = alone.cases["digits-badnets"].masks.tensors()
        assert set(kept) == set(expected)
        for name, values in expected.items():
            assert (kept[name] == values).all(), (number, name)
        assert record["attack_success"] == alone.scores["attack_success"]


def require_starts(ran, again):
    """Those of `again` were started twice, and found their state; the others once."""
    found = {
        number: [n for start, n in ran.starts if start == number] for number in range(ran.config.trials)
    }
    assert found == {n: [0, 1] if n in again else [0] for n in found}


def test_nodes_that_are_killed_cost_no_trial_and_no_bit(tmp_path):
    """24 trials, three nodes, two of which are killed: at a trial's very end, and in one's middle."""

    def kill(ran):
        for number in (4, 13):
            ran.cluster.remove_node(ran.node_of(number), allow_graceful=False)

    ran = Disturbed(tmp_path, trials=24, plan={4: END, 13: 3})
    ran.run(kill)
    require_each_once(ran)
    require_starts(ran, again=(4, 13))
    require_bits(ran, 4, 13, 1, 23)


def descendants(pid):
    """A process and all that it has started, as far as they live."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += descendants(int(child))
    return found


def test_a_process_that_dies_and_nodes_that_freeze_count_nothing_twice(tmp_path, monkeypatch):
    """To the others a frozen node is one behind a broken network: connections stay, nothing answers.

    Trial 2's process is killed. Trial 3's node answers again in time, and the trial goes on there.
    Trial 5's node answers again when it was given up and the trial has ended elsewhere.
    """
    for name, value in QUICK.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))

    def freeze(ran):
        def send(what, processes):
            for pid in processes:
                os.kill(pid, what)

        slow = descendants(ran.node_of(3).all_processes["raylet"][0].process.pid)
        send(signal.SIGSTOP, slow)
        time.sleep(2)
        send(signal.SIGCONT, slow)
        ran.go(3)
        lost = ran.node_of(5)
        raylet = lost.all_processes["raylet"][0].process
        cut_off = descendants(raylet.pid)
        send(signal.SIGSTOP, cut_off)
        ran.go(5)
        until(lambda: 5 in ran.records())
        assert lost.node_id not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        send(signal.SIGCONT, cut_off)
        until(lambda: raylet.poll() is not None)  # it hears that it was given up
        ran.go(11)

    ran = Disturbed(tmp_path, trials=12, plan={2: -3, 3: 3, 5: 3, 11: 1})
    ran.run(freeze)
    require_each_once(ran)
    require_starts(ran, again=(2, 5))
    require_bits(ran, 2, 3, 5, 11)


def test_an_object_store_that_spills_costs_nothing(tmp_path):
    """Victims are in the head's store when it overflows, and a node that comes later fetches them."""
    size = 60 * 2**20

    def overflow(ran):
        ran.node_of(1)
        kept = [ray.put(np.full(size, value, dtype=np.uint8)) for value in (3, 4)]
        session = Path(ran.cluster.head_node.get_session_dir_path())
        until(lambda: list(session.glob("ray_spilled_objects*/*")))
        ran.add_node()
        ran.node_of(2)  # it runs there, since the other node has one CPU
        ran.go(1)
        ran.go(2)
        assert all((ray.get(one) == value).all() for one, value in zip(kept, (3, 4), strict=True))

    ballast = [np.zeros(size, dtype=np.uint8)]
    ran = Disturbed(
        tmp_path, trials=6, plan={1: 1, 2: 1}, ballast=ballast, node={"object_store_memory": 80 * 2**20}
    )
    ran.run(overflow, nodes=1)
    require_each_once(ran)
    require_starts(ran, again=())
    require_bits(ran, 1, 2)


@pytest.fixture
def small_disk():
    """A file system of its own, 64 MiB; its path is short, since Ray's sockets lie there."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a disk")
    path = Path(tempfile.mkdtemp(prefix="disk-", dir="/tmp"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)
    path.rmdir()


def test_a_node_whose_disk_fills_up_loses_no_trial(tmp_path, small_disk):
    """Its own disk, which holds all that Ray and temporary files write there, has no byte left."""

    def fill(ran):
        place = str(small_disk)
        ran.node_of(1)
        full = ran.add_node(temp_dir=place, env_vars={"TMPDIR": place})
        assert (
            ran.node_of(3) is full
        )  # the second that it runs, so that it knows where temporary files go
        with (small_disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        ran.go(3)
        until(lambda: ran.records().keys() >= {3, 4, 5})  # which the full node alone can run
        ran.go(1)

    ran = Disturbed(tmp_path, trials=12, plan={1: 1, 3: 3})
    ran.run(fill, nodes=1)
    require_each_once(ran)
    require_bits(ran, 3, 4)
