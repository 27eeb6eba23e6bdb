import math

import pytest
import torch
from torch import nn

from bimask.defences.base import CleanData
from bimask.defences.finetuning.ft_sam import FtSam, FtSamConfig, perturbation, sam_step


def test_the_perturbation_is_that_of_the_formula():
    """w = (1, -2), g = (3, 1): T g = (3, 2), T^2 g = (3, 4); rho 2."""
    (found,) = perturbation([torch.tensor([1.0, -2.0])], [torch.tensor([3.0, 1.0])], 2.0)
    assert found.tolist() == pytest.approx([6 / math.sqrt(13), 8 / math.sqrt(13)])


def test_all_weights_share_one_norm_and_those_without_a_gradient_stay():
    found = perturbation(
        [torch.tensor([1.0]), torch.tensor([-2.0]), torch.tensor([7.0])],
        [torch.tensor([3.0]), torch.tensor([1.0]), None],
        2.0,
    )
    assert [f.item() for f in found] == pytest.approx([6 / math.sqrt(13), 8 / math.sqrt(13), 0.0])


@pytest.mark.parametrize("rho", [0.0, 0.5, 2.0])
def test_a_step_goes_along_the_gradient_where_the_loss_is_high(rho):
    """Of w^2 / 2 at w = 2: e = rho 4 2 / (2 2) = 2 rho, and the gradient at w + e is 2 + 2 rho."""
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(2.0)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = sam_step(net, optimiser, lambda: net.weight.square().sum() / 2, rho)
    assert loss.item() == pytest.approx(2.0)
    assert net.weight.item() == pytest.approx(2 - 0.1 * (2 + 2 * rho))


def test_a_batch_counts_once_in_running_statistics():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    images = torch.rand(8, 3)
    once = torch.nn.BatchNorm1d(3)
    once(images)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    sam_step(net, optimiser, lambda: net(images).square().sum(), 2.0)
    assert torch.equal(net[0].running_mean, once.running_mean)
    assert torch.equal(net[0].running_var, once.running_var)
    assert net[0].num_batches_tracked == 1
    assert net[0].momentum == 0.1


def test_without_a_perturbation_it_is_plain_fine_tuning():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    images, labels = torch.rand(6, 1, 2, 2), torch.arange(6) % 3
    config = FtSamConfig(rho=0, epochs=3, lr=0.1, batch_size=6, momentum=0.9, weight_decay=0.01)
    (result,) = FtSam().run(
        net, CleanData(images, labels), [config], generators=[torch.Generator().manual_seed(0)]
    )
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    plain.load_state_dict(net.state_dict())
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for epoch in range(3):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * epoch / 3)) / 2
        loss = nn.functional.cross_entropy(plain(images), labels, label_smoothing=0.1)
        assert result.history[epoch].loss == pytest.approx(loss.item(), rel=1e-5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.testing.assert_close(result.model()(images), plain(images))
    assert result.passes.forward == result.passes.backward == 6


def test_one_image_alone_joins_the_batch_before_it():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    images, labels = torch.rand(9, 1, 2, 2), torch.arange(9) % 2
    config = FtSamConfig(epochs=1, batch_size=4)
    (result,) = FtSam().run(
        net, CleanData(images, labels), [config], generators=[torch.Generator().manual_seed(0)]
    )
    assert len(result.history) == config.steps(9) == 2
