import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from bimask.defences.base import CleanData
from bimask.defences.pruning.bnp import Bnp, BnpConfig, clean_statistics, distance
from bimask.errors import ModelError


def test_the_distance_is_the_divergence_of_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(5, eps=1e-3)
    norm.running_mean.copy_(torch.randn(5, generator=generator))
    norm.running_var.copy_(torch.rand(5, generator=generator) + 0.1)
    mean = torch.randn(5, generator=generator).double()
    variance = torch.rand(5, generator=generator).double() + 0.1
    own = Normal(norm.running_mean.double(), (norm.running_var.double() + 1e-3).sqrt())
    expected = kl_divergence(Normal(mean, (variance + 1e-3).sqrt()), own)
    torch.testing.assert_close(distance(norm, mean, variance), expected)
    assert (expected >= 0).all()


def test_a_channel_that_never_varies_is_at_no_distance():
    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(2.0)
    norm.running_var.zero_()
    found = distance(norm, torch.tensor([2.0]).double(), torch.zeros(1).double())
    assert found.item() == pytest.approx(0.0)


@pytest.mark.parametrize("size", [7, 3, 2])
def test_statistics_are_those_of_all_images(size):
    """The last batch of 7 in parts of 3 or 2 is one image."""
    images = torch.rand(7, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2)).eval()
    net[0].running_var.fill_(0.25)
    found = clean_statistics(net, ["0", "1"], images.split(size))
    for name, values in (("0", images), ("1", net[0](images).detach())):
        flat = values.transpose(0, 1).flatten(1).double()
        torch.testing.assert_close(found[name][0], flat.mean(1))
        torch.testing.assert_close(found[name][1], flat.var(1))


def test_the_channel_that_a_poisoned_set_moved_is_pruned():
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval()
    images = torch.rand(50, 8, 2, 2, generator=generator)
    net[0].running_mean.fill_(0.5)
    net[0].running_var.fill_(1 / 12)
    net[0].running_mean[6] += 0.4  # images with a trigger were bright here
    with torch.no_grad():
        net[0].bias.fill_(0.5)
    (result,) = Bnp().run(net, CleanData(images), [BnpConfig(u=2.0)], generators=[torch.Generator()])
    norm = result.model()[0]
    assert [k for k in range(8) if norm.weight[k] == 0 and norm.bias[k] == 0] == [6]
    assert result.numbers == {"pruned_share": 1 / 8}
    assert (result.passes.forward, result.passes.backward) == (1, 0)
    (same,) = Bnp().run(
        net, CleanData(images), [BnpConfig(u=2.0, batch_size=7)], generators=[torch.Generator()]
    )
    assert torch.equal(same.model()[0].weight, norm.weight)
    assert same.passes.forward == 8


def test_a_net_without_norms_is_refused_with_what_to_do():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with pytest.raises(ModelError, match="BNP prunes or masks channels of batch norms.*`ims`"):
        Bnp().check(net, torch.rand(4, 1, 4, 4))
