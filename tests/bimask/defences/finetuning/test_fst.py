import math

import pytest
import torch
from torch import nn

from bimask.defences.base import CleanData
from bimask.defences.finetuning.fst import (
    Fst,
    FstConfig,
    begin_anew,
    classifier_of,
    objective,
    project,
)
from bimask.defences.finetuning.ft import Ft, FtConfig
from bimask.errors import ModelError

NOW = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
SUSPECT = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # <W, W0> = 5, ||W - W0|| = sqrt(4 + 9 + 9)


def run(defence, net, clean, config):
    (result,) = defence.run(net, clean, [config], generators=[torch.Generator().manual_seed(0)])
    return result


def values(terms):
    return {name: term.item() for name, term in terms.items()}


def test_the_objective_of_fst_by_hand():
    terms = objective(torch.tensor(0.7), NOW, SUSPECT, FstConfig(alpha=0.2))
    assert values(terms) == pytest.approx({"cross_entropy": 0.7, "alignment": 1.0})


@pytest.mark.parametrize(
    ("penalty", "cross_entropy", "expected"),
    [
        (10, 0.6, {"cross_entropy": 10 * 0.5 / 11, "distance": -math.sqrt(22) / 11}),
        (10, 0.05, {"cross_entropy": 0.0, "distance": -math.sqrt(22) / 11}),
        (0.5, 0.6, {"cross_entropy": 0.25, "distance": -math.sqrt(22)}),
        (1, 0.6, {"cross_entropy": 0.5, "distance": -math.sqrt(22)}),
    ],
)
def test_the_objective_of_d3_by_hand(penalty, cross_entropy, expected):
    config = FstConfig.profile("d3", penalty=penalty)
    terms = objective(torch.tensor(cross_entropy), NOW, SUSPECT, config)
    assert values(terms) == pytest.approx(expected)


def test_a_weight_is_scaled_to_the_norm():
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    project(weight, torch.tensor(10.0))
    assert weight.tolist() == [[6.0, 0.0], [0.0, 8.0]]
    project(weight, torch.tensor(0.0))
    assert not weight.any()
    project(weight, torch.tensor(5.0))
    assert not weight.any(), "zeros have no direction to be scaled along"


@pytest.mark.parametrize("variant", ["fst", "d3"])
def test_the_classifier_begins_elsewhere_with_its_norm(variant):
    layer = nn.Linear(50, 10)
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    begin_anew(layer, variant, torch.Generator().manual_seed(0))
    assert layer.weight.norm().item() == pytest.approx(before.norm().item(), rel=1e-5)
    drawn = layer.weight / layer.weight.abs().max()
    assert drawn.min() < -0.97
    assert drawn.abs().mean().item() == pytest.approx(0.5, abs=0.05), "it is uniform"
    assert abs((drawn * before).sum() / (drawn.norm() * before.norm())) < 0.2
    assert torch.equal(layer.bias, bias) == (variant == "d3")


@pytest.mark.parametrize(
    "config", [FstConfig(lr=0.5, alpha=0.02, epochs=30), FstConfig.profile("d3", lr=0.5, penalty=10)]
)
def test_a_planted_trigger_goes_where_plain_fine_tuning_leaves_it(config):
    """Pixel 2 is a trigger of class 1 that no clean image has, so that it has no gradient of theirs."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[4.0, -4.0, -9.0], [-4.0, 4.0, 9.0]]))
    images = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).repeat(4, 1).view(8, 1, 1, 3)
    clean = CleanData(images, torch.arange(8) % 2)
    triggered = images.clone()
    triggered[..., 2] = 1
    plain = run(Ft(), net, clean, FtConfig(epochs=20, lr=0.5)).model()
    assert (plain(triggered).argmax(1) == 1).all()
    result = run(Fst(), net, clean, config)
    assert (result.model()(images).argmax(1) == clean.labels).all()
    assert (result.model()(triggered)[clean.labels == 0].argmax(1) == 0).all()
    weight = result.tensors["1.weight"]
    assert weight.norm().item() == pytest.approx(net[1].weight.norm().item(), rel=1e-5)
    assert len(result.history) == result.passes.forward == result.passes.backward == config.epochs


class Unlike(nn.Module):
    """Layers are called in another order than they stand in, and one is not called at all."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(4, 3, 1)
        self.first = nn.Conv2d(1, 4, 3)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.first(x)).mean((2, 3))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16, 3))

    def forward(self, x):
        return x.flatten(1) @ self.weight


def test_the_classifier_is_what_is_called_last():
    assert classifier_of(Unlike().eval(), torch.rand(2, 1, 4, 4)) == "last"
    clean = CleanData(torch.rand(6, 1, 4, 4), torch.arange(6) % 3)
    net = Unlike().eval()
    result = run(Fst(), net, clean, FstConfig(epochs=1))
    assert not torch.equal(result.tensors["last.weight"], net.last.weight)
    assert torch.equal(result.tensors["unused.weight"], net.unused.weight)


def test_a_net_without_a_last_layer_of_its_own_is_refused():
    normed = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(16, 3)))
    for net in (Bare(), normed):
        with pytest.raises(ModelError, match="take another defence, such as `ft_sam`"):
            Fst().check(net.eval(), torch.rand(2, 1, 4, 4))


def test_the_profile_is_the_published_d3():
    assert FstConfig.profile("d3").model_dump() == FstConfig(variant="d3", epochs=100).model_dump()
    assert (FstConfig().epochs, FstConfig().alpha) == (10, 0.2)
