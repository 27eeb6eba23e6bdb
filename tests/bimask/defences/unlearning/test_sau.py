import math

import pytest
import torch
from torch import nn

from bimask.defences.unlearning.losses import minus_log_other
from bimask.defences.unlearning.sau import (
    Sau,
    SauConfig,
    inner_objective,
    js_divergence,
    outer_losses,
    shared_adversarial,
)

P = torch.tensor([[0.75, 0.25]])
Q = torch.tensor([[0.25, 0.75]])
JS = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # of both to their middle (1/2, 1/2)


def test_the_divergence_is_that_of_the_formula():
    assert js_divergence(P.log(), Q.log()).item() == pytest.approx(JS)
    assert js_divergence(P.log(), P.log()).item() == pytest.approx(0, abs=1e-7)
    apart = torch.tensor([[60.0, 0.0]])
    assert js_divergence(apart, -apart).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("own", "theirs", "label", "expected"),
    [
        # both right: either cross-entropy counts, and the divergence
        ([0.6, 0.3, 0.1], [0.5, 0.2, 0.3], 0, ("own", "theirs", "js")),
        # the net is misled: the suspect's counts alone
        ([0.3, 0.6, 0.1], [0.5, 0.2, 0.3], 0, ("theirs", "js")),
        # both are misled, but not alike: the divergence alone
        ([0.3, 0.6, 0.1], [0.2, 0.3, 0.5], 0, ("js",)),
        # both are misled alike: nothing is left to do
        ([0.3, 0.6, 0.1], [0.2, 0.5, 0.3], 0, ()),
    ],
)
def test_an_image_is_let_alone_where_it_is_done(own, theirs, label, expected):
    p, q = torch.tensor([own]), torch.tensor([theirs])
    m = (p + q) / 2
    terms = {
        "own": 0.01 * p[0, label].log(),
        "theirs": 0.01 * q[0, label].log(),
        "js": ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2,
    }
    found = inner_objective(p.log(), q.log(), torch.tensor([label]), 0.01, 1.0)
    assert found.item() == pytest.approx(sum(float(terms[name]) for name in expected), abs=1e-7)


def test_the_outer_loss_pushes_from_the_suspects_mistakes_alone():
    clean = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1]]).log()
    perturbed = torch.tensor([[0.3, 0.6, 0.1], [0.25, 0.5, 0.25]]).log()
    theirs = torch.tensor([[0.0, 5.0, 0.0], [0.0, 5.0, 0.0]])  # wrong of the first, right of the second
    config = SauConfig(robust_weight=0.5, clean_weight=2.0, shared_weight=3.0)
    losses = outer_losses(clean, perturbed, theirs, torch.tensor([0, 1]), config)
    assert losses["cross_entropy"].item() == pytest.approx(-(math.log(0.8) + math.log(0.7)))
    robust = -0.5 * (math.log(0.3) + math.log(0.5)) / 2
    assert losses["robust_cross_entropy"].item() == pytest.approx(robust)
    assert losses["shared"].item() == pytest.approx(-3 * math.log(1 - 0.6) / 2)


def test_the_push_has_a_gradient_where_the_net_is_sure():
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    loss = minus_log_other(logits, torch.tensor([0])).sum()
    loss.backward()
    assert loss.item() == pytest.approx(200 - math.log(2))
    assert logits.grad.tolist()[0] == pytest.approx([1.0, -0.5, -0.5])


@pytest.mark.parametrize("inner_lr", [None, 0.03])
def test_perturbed_images_stay_in_the_ball_and_in_the_range_of_images(inner_lr):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    images, labels = torch.rand(7, 1, 4, 4), torch.arange(7) % 3
    config = SauConfig(budget=0.1, inner_lr=inner_lr)
    moved = shared_adversarial(net, other, images, labels, config)
    assert (moved - images).abs().max() <= 0.1 + 1e-6
    assert 0 <= moved.min() < moved.max() <= 1
    before = inner_objective(net(images), other(images), labels, 0.01, 1.0)
    assert inner_objective(net(moved), other(moved), labels, 0.01, 1.0) < before


def test_a_square_that_the_net_obeyed_is_forgotten(toy):
    toy.forgets(Sau(), SauConfig(epochs=30, lr=3e-3, budget=0.4))


def test_batch_norms_keep_their_statistics(toy):
    result = toy.defended(Sau(), SauConfig(epochs=1))
    assert torch.equal(result.tensors["1.running_mean"], toy.net.state_dict()["1.running_mean"])
