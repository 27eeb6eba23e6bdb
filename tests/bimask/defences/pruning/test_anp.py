import math

import pytest
import torch
from torch import nn

from bimask.defences.base import CleanData
from bimask.defences.pruning.anp import Anp, AnpConfig, ascend, mask_step
from bimask.defences.pruning.layers import NormMasks
from bimask.errors import ModelError


def test_the_disturbance_goes_along_the_sign_of_its_gradient_and_stays_within_eps():
    """Of the loss 3 a - 2 b, from 0.1 and 0.3 in one step of 0.4: 0.5, which is clipped, and -0.1."""

    def loss_under(noise):
        return 3 * noise[0].sum() - 2 * noise[1].sum()

    start = [torch.tensor([0.1]), torch.tensor([0.3])]
    one, other = ascend(loss_under, start, eps=0.4, steps=1)
    assert one.item() == pytest.approx(0.4)
    assert other.item() == pytest.approx(-0.1)
    one, other = ascend(loss_under, start, eps=0.4, steps=2)
    assert one.item() == pytest.approx(0.4)
    assert other.item() == pytest.approx(-0.1)
    one, other = ascend(loss_under, start, eps=0.0, steps=1)
    assert one.item() == other.item() == 0.0


def one_norm():
    """Images (N, 1, 1, 1) -> logits (z, 0) with z = 2 n + 0.5, n the image in the norm's units."""
    net = nn.Sequential(nn.BatchNorm2d(1, eps=1e-12), nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        net[0].weight.fill_(2.0)
        net[0].bias.fill_(0.5)
        net[2].weight.copy_(torch.tensor([[1.0], [0.0]]))
        net[2].bias.zero_()
    return net.requires_grad_(False)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_a_step_of_the_mask_is_that_of_the_formula():
    """Two images, 0 and 1, are -1 and 1 in units of their own batch. Both are of class 0, so that the
    loss is the mean of ln(1 + exp(-z)) over z = 2 (m + d) (-1, 1) + 0.5 (1 + x)."""
    net = one_norm().train()
    masks = NormMasks(net, ["0"])
    with torch.no_grad():
        masks.values[0].fill_(0.9)
    images, labels = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.zeros(2, dtype=torch.long)
    config = AnpConfig(eps=0.4, alpha=0.2, mask_lr=0.1, momentum=0)
    optimiser = torch.optim.SGD(masks.parameters(), lr=0.1)
    start = torch.empty(1).uniform_(-1, 1, generator=torch.Generator().manual_seed(7)).item()
    losses = mask_step(net, masks, optimiser, images, labels, config, torch.Generator().manual_seed(7))

    def slopes(m, b):
        """Of the loss by m and by x, at the scale 2 m and the shift b."""
        wrong = [sigmoid(-(2 * m * n + b)) for n in (-1, 1)]
        return (2 * wrong[0] - 2 * wrong[1]) / 2, -0.5 * sum(wrong) / 2

    def loss(m, b):
        return sum(math.log1p(math.exp(-(2 * m * n + b))) for n in (-1, 1)) / 2

    # the gradient by d is positive and that by x negative, wherever the disturbance starts
    d = min(0.4 * start + 0.4, 0.4)
    generator = torch.Generator().manual_seed(7)
    torch.empty(1).uniform_(-1, 1, generator=generator)
    x = max(0.4 * torch.empty(1).uniform_(-1, 1, generator=generator).item() - 0.4, -0.4)
    assert losses["natural"] == pytest.approx(0.2 * loss(0.9, 0.5), rel=1e-5)
    assert losses["disturbed"] == pytest.approx(0.8 * loss(0.9 + d, 0.5 * (1 + x)), rel=1e-5)
    slope = 0.2 * slopes(0.9, 0.5)[0] + 0.8 * slopes(0.9 + d, 0.5 * (1 + x))[0]
    assert masks.values[0].item() == pytest.approx(0.9 - 0.1 * slope, rel=1e-5)


def test_masks_stay_between_0_and_1():
    net = one_norm().train()
    images, labels = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.zeros(2, dtype=torch.long)
    for rate, expected in ((1e6, 0.0), (-1e6, 1.0)):
        masks = NormMasks(net, ["0"])
        optimiser = torch.optim.SGD(masks.parameters(), lr=1e6)
        if rate < 0:
            optimiser.param_groups[0]["maximize"] = True
        mask_step(net, masks, optimiser, images, labels, AnpConfig(), torch.Generator())
        assert masks.values[0].item() == expected


def planted(backdoor=8.0):
    """Images (N, 1, 4, 4) -> 2 classes: whether the left half is brighter, and a channel that answers a
    bright corner, which no clean image has, with class 1."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 4, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3, 2)
    )
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[0, 0, :, :2], net[0].weight[0, 0, :, 2:] = 0.25, -0.25
        net[0].weight[1] = -net[0].weight[0]
        net[0].weight[2, 0, 3, 3] = 1.0
        net[1].bias[2] = -1.5  # sleeps but for the corner
        net[1].running_var.copy_(torch.tensor([0.25, 0.25, 0.04]))
        net[4].weight.copy_(torch.tensor([[4.0, -4.0, -backdoor], [-4.0, 4.0, backdoor]]))
        net[4].bias.zero_()
    return net.eval()


def halves(count=40):
    """Images with a bright half, and a corner that is nearly dark."""
    generator = torch.Generator().manual_seed(0)
    images = 0.1 * torch.rand(count, 1, 4, 4, generator=generator)
    labels = torch.arange(count) % 2
    images[labels == 0, :, :, :2] += 0.7
    images[labels == 1, :, :, 2:] += 0.7
    images[:, :, 3, 3] = 0.1 * torch.rand(count, 1, generator=generator)
    return CleanData(images, labels)


def triggered(clean):
    images = clean.images[clean.labels == 0].clone()
    images[:, :, 3, 3] = 1.0
    return images


def test_a_channel_that_makes_clean_images_err_when_it_is_disturbed_is_pruned():
    net, clean = planted(), halves()
    before = net(triggered(clean)).argmax(1).float().mean()
    config = AnpConfig(iterations=60, eps=0.6)
    (result,) = Anp().run(net, clean, [config], generators=[torch.Generator().manual_seed(0)])
    model = result.model()
    assert before == 1
    assert model(triggered(clean)).argmax(1).float().mean() == 0
    assert (model(clean.images).argmax(1) == clean.labels).all()
    assert result.numbers == {"pruned_share": pytest.approx(1 / 3)}
    assert model[1].weight.tolist() == [1.0, 1.0, 0.0]
    assert model[1].bias[2] == -1.5
    assert torch.equal(model[1].running_mean, net[1].running_mean)
    assert result.passes.forward >= 3 * 60


def test_a_net_without_norms_is_refused_with_what_to_do():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with pytest.raises(ModelError, match="ANP prunes or masks channels of batch norms.*`ims`"):
        Anp().check(net, torch.rand(4, 1, 4, 4))
