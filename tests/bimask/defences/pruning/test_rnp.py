import math

import pytest
import torch
from torch import nn

from bimask.defences.base import CleanData
from bimask.defences.pruning.layers import NormMasks
from bimask.defences.pruning.rnp import Rnp, RnpConfig, recover_step, unlearn_step


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def line(weight):
    """Images (N, 1, 1, 1) -> logits (w x, 0)."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[weight], [0.0]]))
    return net


@pytest.mark.parametrize("clip", [20.0, 0.1])
def test_unlearning_goes_up_the_loss_along_a_clipped_gradient(clip):
    """Of ln(1 + exp(-w)) at w = 1 the gradient is -s by w and s by the other, s = 1 / (1 + e)."""
    net = line(1.0)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
    images, labels = torch.ones(2, 1, 1, 1), torch.zeros(2, dtype=torch.long)
    loss, right = unlearn_step(net, optimiser, images, labels, clip)
    slope = min(sigmoid(-1.0), clip / math.sqrt(2))
    assert loss == pytest.approx(-math.log1p(math.exp(-1)))
    assert right == 2
    assert net[1].weight.flatten().tolist() == pytest.approx([1 - 0.5 * slope, 0.5 * slope], rel=1e-4)


def test_recovery_moves_the_masks_alone():
    """Of images -1 and 1 in the units of their batch, of the classes 1 and 0, the loss is
    ln(1 + exp(-3 m)), its gradient -3 / (1 + exp(3 m))."""
    net = nn.Sequential(nn.BatchNorm2d(1, eps=1e-12), *line(1.0)).train().requires_grad_(False)
    net[0].weight.fill_(3.0)
    masks = NormMasks(net, ["0"])
    with torch.no_grad():
        masks.values[0].fill_(0.5)
    before = [p.clone() for p in net.parameters()]
    optimiser = torch.optim.SGD(masks.parameters(), lr=0.1)
    images, labels = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.tensor([1, 0])
    loss = recover_step(net, masks, optimiser, images, labels)
    assert loss == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-5)
    assert masks.values[0].item() == pytest.approx(0.5 + 0.1 * 3 * sigmoid(-1.5), rel=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    optimiser.param_groups[0]["lr"] = 1e6
    recover_step(net, masks, optimiser, images, labels)
    assert masks.values[0].item() == 1.0


def toy():
    """Two channels each see a class; a third sees a bright corner, and answers with class 1."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 4, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3, 2)
    )
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].weight[0, 0, :, :2], net[0].weight[0, 0, :, 2:] = 0.25, -0.25
        net[0].weight[1] = -net[0].weight[0]
        net[0].weight[2, 0, 3, 3] = 1.0
        net[1].running_var.copy_(torch.tensor([0.25, 0.25, 0.04]))
        net[4].weight.copy_(torch.tensor([[2.0, -2.0, -3.0], [-2.0, 2.0, 3.0]]))
        net[4].bias.zero_()
        net[1].bias[2] = -1.0
    return net.eval()


def data(count=40):
    generator = torch.Generator().manual_seed(0)
    images = 0.1 * torch.rand(count, 1, 4, 4, generator=generator)
    labels = torch.arange(count) % 2
    images[labels == 0, :, :, :2] += 0.7
    images[labels == 1, :, :, 2:] += 0.7
    images[:, :, 3, 3] = 0.1 * torch.rand(count, 1, generator=generator)
    return CleanData(images, labels)


def test_unlearning_ends_when_few_are_right_and_what_recovery_needs_not_is_pruned():
    net, clean = toy(), data()
    config = RnpConfig(lr=0.02, epochs=30, batch_size=40, unlearned=0.5)
    (result,) = Rnp().run(net, clean, [config], generators=[torch.Generator().manual_seed(0)])
    phases = [next(iter(step.losses)) for step in result.history]
    assert phases.count("recovery") == 30
    assert 0 < phases.count("unlearning") < 30
    assert phases == sorted(phases, key=["unlearning", "recovery"].index)
    assert len(phases) <= config.steps(len(clean.images))
    model = result.model()
    bright = clean.images[clean.labels == 0].clone()
    bright[:, :, 3, 3] = 1.0
    assert net(bright).argmax(1).float().mean() == 1
    assert model(bright).argmax(1).float().mean() == 0
    assert (model(clean.images).argmax(1) == clean.labels).all()
    assert model[1].weight.tolist() == [1.0, 1.0, 0.0]
    assert torch.equal(model[0].weight, net[0].weight), "what unlearned is not the result"


def test_without_an_accuracy_to_end_at_it_unlearns_in_all_epochs():
    config = RnpConfig(lr=0.3, epochs=3, batch_size=40, unlearned=None, max_drop=None)
    (result,) = Rnp().run(toy(), data(), [config], generators=[torch.Generator().manual_seed(0)])
    assert len(result.history) == config.steps(40) == 6
