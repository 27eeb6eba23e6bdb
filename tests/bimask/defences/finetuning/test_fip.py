import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.finetuning.fip import Fip, FipConfig, drift, fisher_diagonal, fisher_trace
from bimask.defences.sgd import weights_of

LABELS = torch.tensor([0, 2, 1, 2])
IMAGES = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def small(norm):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double()


def brute_force(net, of_image):
    """Squared gradients of log p(y | x), image by image: (B, weights)."""
    rows = []
    for i in range(len(IMAGES)):
        loss = F.cross_entropy(of_image(i), LABELS[i : i + 1])
        gradients = torch.autograd.grad(loss, weights_of(net))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).square())
    return torch.stack(rows)


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(3)])
def test_over_all_signs_the_estimate_of_the_trace_is_that_of_brute_force(norm):
    """A batch norm in training mode makes each image's gradient one of the whole batch."""
    net = small(norm).train()
    weights = weights_of(net)
    found = [
        fisher_trace(net(IMAGES), LABELS, weights, torch.tensor(signs, dtype=torch.float64)).item()
        for signs in itertools.product([-1, 1], repeat=4)
    ]
    expected = brute_force(net, lambda i: net(IMAGES)[i : i + 1]).sum(1).mean().item()
    assert sum(found) / 16 == pytest.approx(expected, rel=1e-9)
    assert min(found) < expected < max(found)


def test_the_gradient_of_the_trace_is_that_of_brute_force():
    net = small(nn.Identity())
    weights = weights_of(net)
    total = sum(
        fisher_trace(net(IMAGES), LABELS, weights, torch.tensor(signs, dtype=torch.float64))
        for signs in itertools.product([-1, 1], repeat=4)
    )
    found = torch.autograd.grad(total / 16, weights)

    def trace(values):
        def of_one(values, image, label):
            return F.cross_entropy(functional_call(net, values, (image[None],)), label[None])

        each = vmap(grad(of_one), (None, 0, 0))(values, IMAGES, LABELS)
        return sum(gradient.square().sum() for gradient in each.values()) / 4

    expected = grad(trace)(dict(net.named_parameters()))
    for one, other in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_diagonal_is_the_mean_of_squared_gradients_of_images_alone():
    net = small(nn.BatchNorm2d(3)).eval()
    found = fisher_diagonal(net, CleanData(IMAGES, LABELS))
    expected = brute_force(net, lambda i: net(IMAGES[i : i + 1])).mean(0)
    torch.testing.assert_close(torch.cat([part.flatten() for part in found]), expected)


def test_the_way_of_the_weights_by_hand():
    """(2 * 3^2 + 0.5 * 4^2) / 2 + (1 * 2^2) / 2 = 15."""
    now = [torch.tensor([3.0, 5.0]), torch.tensor([0.0])]
    before = [torch.tensor([0.0, 1.0]), torch.tensor([2.0])]
    needed = [torch.tensor([2.0, 0.5]), torch.tensor([1.0])]
    assert drift(now, before, needed).item() == pytest.approx(15)


def test_the_terms_of_a_linear_net_by_hand():
    """W = 0, x = 1 of class 0 of two: each gradient is (1/2, -1/2), so Tr F = 1/2 and diag F0 = 1/4.
    The first step moves W to (lr/2, -lr/2), less what the trace, s (1 - s) 2 at s = 1/2, has no slope
    of."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).eval()
    nn.init.zeros_(net[1].weight)
    clean = CleanData(torch.ones(1, 1, 1, 1), torch.zeros(1, dtype=torch.long))
    config = FipConfig(lr=0.4, epochs=2, trace_weight=0.1, drift_weight=3, momentum=0)
    (result,) = Fip().run(net, clean, [config], generators=[torch.Generator().manual_seed(0)])
    first, second = (step.losses for step in result.history)
    assert first == pytest.approx({"cross_entropy": math.log(2), "trace": 0.05, "drift": 0.0})
    # Tr F = 2 (1 - p)^2, its slope by the first weight is -4 (1 - p) p (1 - p) = -1/2
    moved = 0.4 * (0.5 + 0.1 * 0.5)
    assert second["drift"] == pytest.approx(3 / 2 * 0.25 * 2 * moved**2)
    p = 1 / (1 + math.exp(-2 * moved))
    assert second["trace"] == pytest.approx(0.1 * 2 * (1 - p) ** 2)
    assert (result.passes.forward, result.passes.backward) == (1 + 2, 1 + 6)


def test_the_trace_makes_the_minimum_flatter_and_the_drift_keeps_it_near():
    net = small(nn.BatchNorm2d(3)).float().eval()
    clean = CleanData(IMAGES.float(), LABELS)

    def run(**settings):
        config = FipConfig(epochs=40, lr=0.05, **settings)
        (result,) = Fip().run(net, clean, [config], generators=[torch.Generator().manual_seed(0)])
        model = result.model()
        trace = sum(part.sum() for part in fisher_diagonal(model, clean))
        moved = sum((model.state_dict()[k] - v).norm() for k, v in net.named_parameters())
        return trace.item(), moved.item()

    plain = run(trace_weight=0, drift_weight=0)
    assert run(trace_weight=0.1, drift_weight=0)[0] < 0.8 * plain[0]
    assert run(trace_weight=0, drift_weight=100)[1] < 0.8 * plain[1]


def test_attention_is_derived_twice():
    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            tokens = x.flatten(1).unflatten(1, (4, 4))
            return self.fc(self.attend(tokens, tokens, tokens, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    clean = CleanData(IMAGES.float(), LABELS)
    (result,) = Fip().run(
        Attentive().eval(), clean, [FipConfig(epochs=2)], generators=[torch.Generator().manual_seed(0)]
    )
    assert result.history[0].losses["trace"] > 0
