import math

import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from bimask.defences.base import CleanData
from bimask.defences.pruning.awm import Awm, AwmConfig, WeightMasks, loss_terms, onto_l1, worse
from bimask.errors import ModelError


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("largest", [0.3, 1.0, 100.0])
def test_the_projection_is_the_nearest_point_of_the_ball(seed, largest):
    """Against a solver over p - q with p, q >= 0."""
    values = torch.randn(5, generator=torch.Generator().manual_seed(seed)).double()
    found = onto_l1(values.view(1, 1, 1, 5), largest).flatten()
    given = values.numpy()
    solved = minimize(
        lambda z: ((z[:5] - z[5:] - given) ** 2).sum(),
        [0.0] * 10,
        jac=lambda z: [*(2 * (z[:5] - z[5:] - given)), *(-2 * (z[:5] - z[5:] - given))],
        bounds=[(0, None)] * 10,
        constraints={"type": "ineq", "fun": lambda z: largest - z.sum()},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    torch.testing.assert_close(found, torch.tensor(solved.x[:5] - solved.x[5:]), atol=1e-5, rtol=0)
    assert found.abs().sum() <= largest + 1e-9


def test_a_ball_of_radius_0_is_the_origin():
    assert onto_l1(torch.tensor([1.0, -2.0]), 0.0).abs().sum() == 0


def line():
    """Images (N, 1, 1, 2) -> logits (w1 x1 + w2 x2, 0), w = (2, -1)."""
    net = nn.Sequential(nn.Conv2d(1, 2, (1, 2), bias=False), nn.Flatten())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[[[2.0, -1.0]]], [[[0.0, 0.0]]]]))
    return net.requires_grad_(False).eval()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_perturbation_goes_up_the_loss_of_what_the_net_says():
    """(0.5, 0.5) is answered by 0.5 > 0: the gradient is -s (2, -1), s = 1 / (1 + e^0.5)."""
    net = line()
    start, images = torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1, 2), 0.5)
    moved = worse(net, {}, images, start, lr=0.1, largest=10.0)
    s = sigmoid(-0.5)
    assert moved.flatten().tolist() == pytest.approx([-0.2 * s, 0.1 * s], rel=1e-5)
    bounded = worse(net, {}, images, start, lr=10.0, largest=0.3)
    assert bounded.abs().sum().item() == pytest.approx(0.3)
    outside = worse(net, {}, images, torch.tensor([[[[-0.6, 0.0]]]]), lr=0.1, largest=10.0)
    assert outside[..., 0].item() == pytest.approx(-0.6), "nothing is gained where it is clipped"


def test_the_loss_of_the_masks_is_that_of_the_formula():
    net = line()
    masks = WeightMasks(net, ["0"])
    with torch.no_grad():
        masks.values[0].copy_(torch.tensor([[[[0.5, 1.0]]], [[[1.0, 0.25]]]]))
    images, labels = torch.tensor([0.8, 0.2]).view(1, 1, 1, 2), torch.tensor([0])
    moved = torch.tensor([0.4, -0.1]).view(1, 1, 1, 2)  # (1.2, 0.1) is clipped to (1, 0.1)
    terms = loss_terms(net, masks, images, labels, moved, AwmConfig(alpha=0.9, mask_weight=0.01))
    assert terms["natural"].item() == pytest.approx(0.9 * math.log1p(math.exp(-0.6)), rel=1e-5)
    assert terms["perturbed"].item() == pytest.approx(0.1 * math.log1p(math.exp(-0.9)), rel=1e-5)
    assert terms["masks"].item() == pytest.approx(0.0275)


def test_masks_have_the_shape_of_their_weights_and_are_folded():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    ).eval()
    clean = CleanData(torch.rand(6, 1, 4, 4), torch.arange(6) % 2)
    config = AwmConfig(rounds=2, mask_lr=0.1, batch_size=4)
    (result,) = Awm().run(net, clean, [config], generators=[torch.Generator().manual_seed(0)])
    masks = result.tensors["0.weight"] / net[0].weight.detach()
    assert result.tensors.keys() == {"0.weight"}
    assert masks.min() >= 0
    assert masks.max() <= 1 + 1e-6
    assert all(len(masks[k].unique()) > 1 for k in range(4)), "single weights, not channels"
    assert len(result.history) == config.steps(6) == 20
    assert result.passes.backward == 2 * 20 + 2 * 2
    assert result.numbers["pruned_share"] == (masks == 0).float().mean()


def test_weights_that_one_perturbation_of_all_images_exploits_fade():
    """Each image has its class in one of two pixels. A third, dark in all of them, would turn any into
    class 1; the masks learn this away, and leave what clean images need."""
    net = nn.Sequential(nn.Conv2d(1, 2, (1, 3), bias=False), nn.Flatten())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[[[6.0, -6.0, 0.0]]], [[[-6.0, 6.0, 30.0]]]]))
    net.eval()
    images = torch.tensor([[0.8, 0.1, 0.0], [0.1, 0.8, 0.0]]).repeat(4, 1).view(8, 1, 1, 3)
    clean = CleanData(images, torch.arange(8) % 2)
    config = AwmConfig(rounds=20, mask_lr=0.05, alpha=0.5, perturbation=0.3)
    (result,) = Awm().run(net, clean, [config], generators=[torch.Generator().manual_seed(0)])
    bright = images[clean.labels == 0].clone()
    bright[..., 2] = 0.5
    model = result.model()
    assert net(bright).argmax(1).tolist() == [1] * 4
    assert model(bright).argmax(1).tolist() == [0] * 4
    assert (model(images).argmax(1) == clean.labels).all()


def test_a_net_without_convolutions_is_refused_with_what_to_do():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with pytest.raises(ModelError, match="AWM prunes or masks convolutions.*`ims`"):
        Awm().check(net, torch.rand(4, 1, 4, 4))
