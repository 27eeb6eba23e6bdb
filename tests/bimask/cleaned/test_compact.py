"""Dead channels go where nothing notices, and stay where a border or a sum would."""

import pytest
import torch
from torch import nn

from bimask import MaskSet, fold
from bimask.cleaned.compact import compact
from bimask.nets import build_net


def net_of(*, padding=1, shift=0.0):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=padding),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()
    with torch.no_grad():
        net[1].running_mean.fill_(-shift)
        for channel in (1, 4):
            net[0].weight[channel], net[0].bias[channel] = 0, 0
    return net


@pytest.fixture
def images():
    return torch.rand(5, 2, 9, 9)


def same(model, compacted, images):
    torch.testing.assert_close(compacted.model(images), model(images), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_channels_that_end_as_zero_are_removed(images, shift):
    net = net_of(shift=shift)
    small = compact(net)
    assert (small.dead, small.removed, small.channels) == (2, 2, 10)
    same(net, small, images)
    convs = [m for m in small.model.modules() if isinstance(m, nn.Conv2d)]
    assert (convs[0].out_channels, convs[1].in_channels) == (4, 4)
    assert net[0].out_channels == 6, "the argument is left as it is"


def test_a_constant_before_a_padded_convolution_stays(images):
    net = net_of(shift=1.0)
    small = compact(net)
    assert (small.dead, small.removed) == (2, 0)
    same(net, small, images)


def test_a_constant_moves_into_the_bias_where_nothing_is_padded(images):
    net = net_of(padding=0, shift=1.0)
    small = compact(net)
    assert small.removed == 2
    same(net, small, images)


def test_one_channel_is_always_left(images):
    net = net_of(shift=-1.0)
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    small = compact(net)
    assert small.removed == 5
    same(net, small, images)


class Summed(nn.Module):
    """The first convolution's channels are also added to the second's."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        nn.init.zeros_(self.a.weight)
        nn.init.zeros_(self.a.bias)

    def forward(self, images):
        first = self.a(images)
        return (first + self.b(first)).mean((2, 3))


def test_what_a_sum_reads_stays(images):
    small = compact(Summed().eval())
    assert (small.dead, small.removed) == (4, 0)


@pytest.mark.parametrize("name", ["small_resnet", "preactresnet18", "vgg19_bn"])
def test_a_net_under_masks_that_decide_answers_the_same(name):
    torch.manual_seed(0)
    model = build_net(
        name, in_channels=3, num_classes=4, width=8, image_size=32, mean=[0.5] * 3, std=[0.5] * 3
    ).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
    masks = MaskSet.for_model(model, straight_through=True)
    with torch.no_grad():
        masks.mask.uniform_(0, 1)
        masks.selection.zero_()
    folded = fold(model, masks)
    small = compact(folded)
    assert small.dead > 0.3 * small.channels
    assert 0 < small.removed < small.dead
    same(folded, small, torch.rand(4, 3, 32, 32))
