"""A training that was killed goes on from its last epoch, to the bits of one that never was."""

import multiprocessing
import os
import signal

import pytest
import torch

from bimask.attacks import ATTACKS
from bimask.errors import VictimRefusedError
from bimask.victims import VictimSpec, obtain_victim, train_victim
from bimask.victims.training_state import Checkpoint

HASTY = {"image_size": 8, "width": 2, "epochs": 3, "min_clean_accuracy": 0, "min_attack_success": 0}
HASTY |= {"poisoning_rate": 0.05}  # clean-label attacks have few images


@pytest.fixture
def spec(quick):
    def make(name, **changes):
        return VictimSpec(**HASTY | {"attack": {"name": name, **quick(name)}} | changes)

    return make


class Killed:
    """Trains in a process of its own, which ends itself by SIGKILL where it is told to."""

    def __init__(self, spec, root, *, epoch=None, preparing=None):
        self.spec, self.root, self.epoch, self.preparing = spec, root, epoch, preparing
        process = multiprocessing.get_context("fork").Process(target=self.train)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL

    def train(self):
        obtain_victim(self.spec, self.root, on_epoch=self.on_epoch, on_prepare=self.on_prepare)

    def on_epoch(self, log):
        if log.epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_prepare(self, what, done, of):
        if (what, done) == self.preparing:
            os.kill(os.getpid(), signal.SIGKILL)


def same_bits(one, other):
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert one.scores == other.scores
    test = one.spec.load_data().test
    assert torch.equal(one.attack.triggered(test).images, other.attack.triggered(test).images)


def names_in(root):
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_a_killed_training_ends_with_the_bits_of_one_that_was_not(name, spec, tmp_path):
    Killed(spec(name), tmp_path, epoch=1)
    assert names_in(tmp_path) == [f".training-{spec(name).digest}"]
    assert all(path.suffix == ".safetensors" for path in next(tmp_path.iterdir()).iterdir())
    epochs, prepared = [], []
    resumed = obtain_victim(
        spec(name), tmp_path, on_epoch=epochs.append, on_prepare=lambda *of: prepared.append(of)
    )
    assert [log.epoch for log in epochs] == [2, 3]
    assert not prepared  # neither the clean net nor what the trigger is made of is made again
    same_bits(resumed, train_victim(spec(name)))
    assert names_in(tmp_path) == [spec(name).digest]


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bfloat16", "flip": True},
        {"optimizer": "adamw", "lr": 0.01, "warmup": 0.5},
        pytest.param(
            {"net": "mobilenet_v3_large", "width": 4, "image_size": 12},  # with dropout
            marks=pytest.mark.slow,
        ),
        {"poisoning_rate": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("attack", ["wanet", pytest.param("input_aware", marks=pytest.mark.slow)])
def test_so_does_one_of_another_recipe(attack, changes, spec, tmp_path):
    made = spec(attack, **changes)
    Killed(made, tmp_path, epoch=2)
    epochs = []
    resumed = obtain_victim(made, tmp_path, on_epoch=epochs.append)
    assert [log.epoch for log in epochs] == [3]
    same_bits(resumed, train_victim(made))


@pytest.mark.parametrize("name", ["label_consistent", "low_frequency"])
def test_a_preparation_goes_on_as_well(name, spec, tmp_path):
    Killed(spec(name), tmp_path, preparing=("clean net", 2))
    prepared = []
    resumed = obtain_victim(spec(name), tmp_path, on_prepare=lambda *of: prepared.append(of))
    assert [of for of in prepared if of[0] == "clean net"] == [("clean net", 3, 3)]
    same_bits(resumed, train_victim(spec(name)))


@pytest.mark.parametrize("name", ["input_aware", "low_frequency", "ssba"])
def test_preparations_are_told(name, spec):
    told = []
    train_victim(spec(name), on_prepare=lambda *of: told.append(of))
    net = [("clean net", epoch, 3) for epoch in (1, 2, 3)] if name == "low_frequency" else []
    assert told == [*net, ("trigger", 1, 1)]


def test_another_spec_begins_anew(spec, tmp_path):
    Killed(spec("badnets"), tmp_path, epoch=2)
    epochs, other = [], spec("badnets", seed=1)
    victim = obtain_victim(other, tmp_path, on_epoch=epochs.append)
    assert [log.epoch for log in epochs] == [1, 2, 3]
    same_bits(victim, train_victim(other))
    # nor where somebody moves the state to where the other spec looks
    left = tmp_path / f".training-{spec('badnets').digest}"
    third = spec("badnets", seed=2)
    left.rename(tmp_path / f".training-{third.digest}")
    same_bits(obtain_victim(third, tmp_path), train_victim(third))


def test_a_damaged_state_begins_anew(spec, tmp_path):
    made, epochs = spec("badnets"), []
    Killed(made, tmp_path, epoch=2)
    state = tmp_path / f".training-{made.digest}" / "victim.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    victim = obtain_victim(made, tmp_path, on_epoch=epochs.append)
    assert [log.epoch for log in epochs] == [1, 2, 3]
    same_bits(victim, train_victim(made))


def test_a_refused_victim_leaves_no_state(spec, tmp_path):
    with pytest.raises(VictimRefusedError):
        obtain_victim(spec("badnets", min_clean_accuracy=1), tmp_path)
    assert names_in(tmp_path) == []


def test_a_state_is_its_own_trainings_alone(tmp_path):
    mine, others = (Checkpoint(tmp_path / "new" / "state", key) for key in ("mine", "another"))
    assert mine.load() is None
    mine.save({"weights": torch.arange(3).expand(2, 3)}, {"epoch": 2, "rate": 0.1 + 0.2})
    tensors, numbers = mine.load()
    assert torch.equal(tensors["weights"], torch.arange(3).expand(2, 3))
    assert numbers == {"epoch": 2, "rate": 0.1 + 0.2}
    assert others.load() is None
    assert names_in(tmp_path / "new") == ["state"]
