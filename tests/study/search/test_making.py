"""Victims made on Ray: as many at once as the CPUs are for, and none without room."""

import pytest
import ray

from bimask.victims import VictimSpec
from study import search
from study.search.victims import make_victims
from study.spec.config import StudyError

pytestmark = pytest.mark.ray

HASTY = {"image_size": 8, "width": 2, "epochs": 12, "min_clean_accuracy": 0, "min_attack_success": 0}


@pytest.fixture
def cpus():
    search.start_ray("local")
    yield int(ray.cluster_resources()["CPU"])
    search.stop_ray()


def test_no_more_are_made_at_once_than_there_are_cpus_for(tmp_path, cpus):
    """Ray gives the CPUs of a task that waits for an answer to the next one."""
    told = []
    make_victims(
        {str(seed): VictimSpec(**HASTY, seed=seed) for seed in range(3)},
        tmp_path,
        device="cpu",
        cpus=cpus,
        gpus=0,
        on_event=lambda event: told.append(event[0]),
        on_end=lambda name, why: told.append((name, why)),
    )
    assert [one[1] for one in told if isinstance(one, tuple)] == [None] * 3
    at = [i for i, one in enumerate(told) if isinstance(one, tuple)]
    for first, last in zip([0, *(i + 1 for i in at)], at, strict=False):
        assert set(told[first:last]) <= {told[last][0]}


def test_without_room_it_says_how_long_it_waited(tmp_path, cpus):
    with pytest.raises(StudyError, match=r"none of 1 node\(s\) has after 0.01 minutes"):
        make_victims(
            {"one": VictimSpec(**HASTY)},
            tmp_path,
            device="cpu",
            cpus=1000 * cpus,
            gpus=0,
            wait=0.01,
            on_event=lambda _: None,
            on_end=lambda *_: None,
        )
