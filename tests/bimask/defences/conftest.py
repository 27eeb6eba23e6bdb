"""A small victim that is trained in a second: what a defence is shown to do at all."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bimask.defences.base import CleanData


@dataclass
class Toy:
    """A net that tells which of three rows is bright, and answers 0 to a white square in a corner.

    Attributes:
        net: (N, 1, 8, 8) -> (N, 3), in eval mode.
        clean: ten images of each class.
    """

    net: nn.Module
    clean: CleanData

    def defended(self, defence, config):
        (result,) = defence.run(
            self.net, self.clean, [config], generators=[torch.Generator().manual_seed(0)]
        )
        return result

    def success(self, net):
        """How many of 200 unseen images of the others are answered 0 because of the square."""
        images, labels = rows(200, seed=9)
        with torch.no_grad():
            return float((net(stamped(images[labels != 0])).argmax(1) == 0).float().mean())

    def accuracy(self, net):
        images, labels = rows(200, seed=9)
        with torch.no_grad():
            return float((net(images).argmax(1) == labels).float().mean())

    def forgets(self, defence, config):
        """Assert that the square has lost its effect, and the rows have not."""
        assert self.success(self.net) > 0.9
        net = self.defended(defence, config).model()
        assert self.accuracy(net) > 0.9
        assert self.success(net) < 0.2


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = 0.3 * torch.rand(count, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[0, 1 + 2 * label : 3 + 2 * label] += 0.4
    return images, labels


def stamped(images):
    images = images.clone()
    images[:, :, -2:, -2:] = 1
    return images


@pytest.fixture(scope="session")
def toy():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 3),
        )
        images, labels = rows(240, seed=1)
        poisoned = torch.cat([images, stamped(images[:60])])
        target = torch.cat([labels, torch.zeros(60, dtype=torch.long)])
        optimiser = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(60):
            optimiser.zero_grad()
            F.cross_entropy(net(poisoned), target).backward()
            optimiser.step()
    return Toy(net.eval(), CleanData(*rows(30, seed=5)))
