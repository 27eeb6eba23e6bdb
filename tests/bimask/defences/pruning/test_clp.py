import math

import pytest
import torch
from torch import nn

from bimask.defences.base import CleanData
from bimask.defences.pruning.clp import Clp, ClpConfig, channel_lipschitz
from bimask.errors import ModelError


def layer(values):
    """A 1x1 convolution of two inputs whose channel k has the singular value values[k]."""
    convolution = nn.Conv2d(2, len(values), 1, bias=False)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([[v * 0.6, v * 0.8] for v in values])[..., None, None])
    return convolution


def test_the_bound_of_a_channel_is_its_largest_singular_value_times_the_norms_scale():
    convolution, norm = layer([1.0, 2.0]), nn.BatchNorm2d(2, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([3.0, -5.0]))
        norm.running_var.copy_(torch.tensor([4.0, 0.25]))
    assert channel_lipschitz(convolution, norm).tolist() == pytest.approx([1.5, 20.0])


def test_a_kernel_is_a_matrix_of_inputs_by_places():
    convolution, norm = nn.Conv2d(2, 1, (1, 2), bias=False), nn.BatchNorm2d(1, eps=0.0)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([[[[3.0, 0.0]], [[4.0, 5.0]]]]))  # [[3, 0], [4, 5]]
    # its singular values are sqrt(45) and sqrt(5)
    assert channel_lipschitz(convolution, norm).item() == pytest.approx(math.sqrt(45))


@pytest.mark.parametrize(("u", "pruned"), [(1.4, [4]), (1.8, []), (0.0, [4])])
def test_channels_far_above_the_mean_of_their_layer_are_taken_out(u, pruned):
    """Of 1, 1, 1, 1, 6 the mean is 2 and the deviation sqrt(5), so that 6 is 1.79 of them above."""
    net = nn.Sequential(
        layer([1, 1, 1, 1, 6]), nn.BatchNorm2d(5, eps=0.0), nn.Flatten(), nn.Linear(20, 2)
    )
    with torch.no_grad():
        net[1].bias.fill_(0.5)
    images = torch.rand(3, 2, 2, 2)
    (result,) = Clp().run(
        net.eval(), CleanData(images), [ClpConfig(u=u)], generators=[torch.Generator()]
    )
    kept = [channel for channel in range(5) if channel not in pruned]
    norm = result.model()[1]
    assert norm.weight[pruned].tolist() == norm.bias[pruned].tolist() == [0.0] * len(pruned)
    assert norm.weight[kept].tolist() == [1.0] * len(kept)
    assert norm.bias[kept].tolist() == [0.5] * len(kept)
    assert result.numbers == {"pruned_share": len(pruned) / 5}
    assert result.changed == bool(pruned)


def test_a_net_without_such_norms_is_refused_with_what_to_do():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)).eval()
    images = torch.rand(4, 1, 8, 8)
    with pytest.raises(ModelError, match="has none; take another defence"):
        Clp().run(net, CleanData(images), [ClpConfig()], generators=[torch.Generator()])
