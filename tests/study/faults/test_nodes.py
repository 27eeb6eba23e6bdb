"""Nodes and processes that die, freeze or run out of room: every trial ends once, same bits."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import ray

from study.search import storage as storages

pytestmark = pytest.mark.ray

END = 7  # states that are kept of a trial: one a round, and one when all is done
# Ray declares a node dead that does not answer for about this long; its default is a minute.
QUICK = {"period_ms": 1000, "timeout_ms": 3000, "failure_threshold": 4}


@pytest.mark.slow
def test_nodes_that_are_killed_cost_no_trial_and_no_bit(disturbed):
    """24 trials, three nodes, two of which are killed: at a trial's very end, and in one's middle."""

    def kill(ran):
        for number in (4, 13):
            ran.cluster.remove_node(ran.node_of(number), allow_graceful=False)

    ran = disturbed(trials=24, plan={4: END, 13: 3})
    ran.run(kill)
    ran.require_each_once()
    ran.require_starts(again=(4, 13))
    ran.require_bits(4, 13, 1, 23)


@pytest.mark.slow
def test_a_trial_goes_on_from_a_bucket_where_nodes_share_no_folder(tmp_path, disturbed):
    """What a trial left on its node goes with it; a folder behind a URI stands for the bucket."""
    bucket = (tmp_path / "bucket").as_uri()

    def kill(ran):
        node = ran.node_of(2)
        local = storages.folder(f"{bucket}/{ran.config.name}") / "checkpoints" / "002"
        assert list(local.glob("*.safetensors"))
        shutil.rmtree(local)
        ran.cluster.remove_node(node, allow_graceful=False)

    ran = disturbed(trials=6, plan={2: 3}, storage=bucket)
    ran.run(kill, nodes=2)
    ran.require_each_once()
    ran.require_starts(again=(2,))
    ran.require_bits(2)
    assert not (tmp_path / "bucket/faults/checkpoints").exists()


@pytest.mark.slow
def test_a_process_that_dies_and_nodes_that_freeze_count_nothing_twice(
    disturbed, descendants, monkeypatch
):
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
        ran.until(lambda: 5 in ran.records())
        assert lost.node_id not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        send(signal.SIGCONT, cut_off)
        ran.until(lambda: raylet.poll() is not None)  # it hears that it was given up
        ran.go(11)

    ran = disturbed(trials=12, plan={2: -3, 3: 3, 5: 3, 11: 1})
    ran.run(freeze)
    ran.require_each_once()
    ran.require_starts(again=(2, 5))
    ran.require_bits(2, 3, 5, 11)


@pytest.mark.slow
def test_an_object_store_that_spills_costs_nothing(disturbed):
    """Victims are in the head's store when it overflows, and a node that comes later fetches them."""
    size = 60 * 2**20

    def overflow(ran):
        ran.node_of(1)
        kept = [ray.put(np.full(size, value, dtype=np.uint8)) for value in (3, 4)]
        session = Path(ran.cluster.head_node.get_session_dir_path())
        ran.until(lambda: list(session.glob("ray_spilled_objects*/*")))
        ran.add_node()
        ran.node_of(2)  # it runs there, since the other node has one CPU
        ran.go(1)
        ran.go(2)
        assert all((ray.get(one) == value).all() for one, value in zip(kept, (3, 4), strict=True))

    ballast = [np.zeros(size, dtype=np.uint8)]
    ran = disturbed(
        trials=6, plan={1: 1, 2: 1}, ballast=ballast, node={"object_store_memory": 80 * 2**20}
    )
    ran.run(overflow, nodes=1)
    ran.require_each_once()
    ran.require_starts(again=())
    ran.require_bits(1, 2)


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


@pytest.mark.slow
def test_a_node_whose_disk_fills_up_loses_no_trial(disturbed, small_disk):
    """Its own disk, which holds all that Ray and temporary files write there, has no byte left."""

    def fill(ran):
        place = str(small_disk)
        ran.node_of(1)
        full = ran.add_node(temp_dir=place, env_vars={"TMPDIR": place})
        assert ran.node_of(3) is full  # the second there: the process has its place for such files
        with (small_disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        ran.go(3)
        ran.until(lambda: ran.records().keys() >= {3, 4, 5})  # which the full node alone can run
        ran.go(1)

    ran = disturbed(trials=12, plan={1: 1, 3: 3})
    ran.run(fill, nodes=1)
    ran.require_each_once()
    ran.require_bits(3, 4)
