"""Shared by the tests: one thread, a cache of the session's own, small nets, ready attacks, recorded
numbers."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start, too: `make test` has a process for each core

import copy
import functools
import inspect
import signal
import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from torch import nn

from bimask.attacks import ATTACKS, build_attack
from bimask.data import ImageData
from bimask.nets import Normalised

torch.set_num_threads(1)
# What a shell runs in the background ignores them, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Files with a Ray in them first: else one process runs the last of them while the other waits."""
    long = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session", autouse=True)
def _places_of_the_session(tmp_path_factory):
    """`make test` runs several processes: none finds another's cache or its Ray."""
    short = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
    with short as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIMASK_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("RAY_TMPDIR", folder)  # a socket's path has at most 107 characters
        yield


@pytest.fixture
def tiny_net():
    """(N, 1, H, W) -> (N, 4) in eval mode, float32, always the same.

    Plain, depthwise and grouped convolutions, each before a batch norm with a history.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 1)
        nn.init.normal_(net[-1].weight, std=2)
    return net.eval()


@pytest.fixture
def pictures():
    """24 different images (24, 1, 8, 8) in [0, 1], float32, always the same."""
    return torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def quick_settings(name):
    """What makes an attack's preparation short: all preparation is counted in steps or epochs."""
    known = inspect.signature(ATTACKS[name]).parameters
    return {key: 1 for key in ("steps", "mask_epochs") if key in known}


def linear_net(data):
    """A classifier of such images that nobody trained, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(data.images[0].numel(), data.num_classes)).eval()


@functools.cache
def _prepared(name, shape, settings):
    attack = build_attack(name, **quick_settings(name) | dict(settings))
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (20, *shape), generator=generator, dtype=torch.uint8)
    data = ImageData(images, torch.arange(20) % 10, tuple("abcdefghij"))
    attack.prepare(data, seed=0, fit_net=linear_net)
    return attack


@pytest.fixture
def ready():
    """name, image shape (C, H, W), settings -> an attack that is prepared, in a hurry."""

    def make(name, shape=(3, 32, 32), **settings):
        return copy.deepcopy(_prepared(name, tuple(shape), tuple(sorted(settings.items()))))

    return make


@pytest.fixture
def quick():
    """The hurry: name -> settings that make the preparation short."""
    return quick_settings


@pytest.fixture
def fit_linear():
    """Images with labels -> a linear net."""
    return linear_net


@pytest.fixture(scope="session")
def parity():
    """Name -> array of tests/data/ims_parity.npz."""
    with np.load(Path(__file__).parent / "data" / "ims_parity.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="session")
def parity_victim(parity):
    """The victim behind the recorded numbers, float64."""
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    weights = {name.removeprefix("net."): v for name, v in parity.items() if name.startswith("net.")}
    net.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    model = Normalised(net, [0.3], [0.35]).double().eval()
    model.mean.fill_(0.3)  # in float64, as recorded
    model.std.fill_(0.35)
    return model
