"""Distances of classes in the space before the last layer."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from bimask.inspection.latent import last_layer, latent_distances, least_distance


@pytest.fixture
def linear():
    """A linear model: its features are the pixels themselves."""

    def make(weight, bias=None):
        layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
        layer.weight.data = torch.tensor(weight)
        if bias is not None:
            layer.bias.data = torch.tensor(bias)
        return nn.Sequential(nn.Flatten(), layer)

    return make


def test_one_constraint_is_the_distance_to_a_plane():
    normal, needed = np.array([[3.0, 4.0]]), np.array([10.0])
    assert least_distance(normal, needed) == pytest.approx(10 / 5)


def test_what_holds_already_costs_nothing():
    assert least_distance(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([-1.0, 0.0])) == 0


def test_contradictions_have_no_distance():
    assert math.isinf(least_distance(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([1.0, 1.0])))


@pytest.mark.parametrize("seed", range(5))
def test_least_distance_is_that_of_a_general_solver(seed):
    generator = np.random.default_rng(seed)
    normals, needed = generator.normal(size=(4, 7)), generator.normal(size=4)
    found = minimize(
        lambda s: s @ s,
        np.zeros(7),
        jac=lambda s: 2 * s,
        constraints={"type": "ineq", "fun": lambda s: normals @ s - needed, "jac": lambda s: normals},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert least_distance(normals, needed) == pytest.approx(math.sqrt(found.fun), rel=1e-5)


def test_two_classes_by_hand(linear):
    # f1 - f0 = x0 - x1; the hardest image for class 1 is (0, 2): it needs s0 - s1 >= 2, |s| = sqrt(2)
    model = linear([[0.0, 1.0], [1.0, 0.0]])
    images = torch.tensor([[0.0, 2.0], [0.0, 1.0], [3.0, 0.0]]).view(3, 1, 1, 2)
    z = images.flatten(1).double()
    spread = (z - z.mean(0)).norm(dim=1).median().item()
    distances = latent_distances(model, images)
    assert distances[1].item() == pytest.approx(math.sqrt(2) / spread, rel=1e-6)
    assert distances[0].item() == pytest.approx(3 / math.sqrt(2) / spread, rel=1e-6)


def test_the_perturbation_sends_every_image_there(linear):
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 8).tolist(), torch.randn(5).tolist()
    images = torch.rand(20, 1, 2, 4)
    for k, distance in enumerate(latent_distances(linear(weight, bias), images)):
        # no shift of less than the distance is enough, in whatever direction
        z = images.flatten(1)
        spread = (z - z.mean(0)).double().norm(dim=1).quantile(0.5)
        shifts = torch.nn.functional.normalize(torch.randn(2000, 8), dim=1) * 0.99 * distance * spread
        logits = (z[None] + shifts[:, None].float()) @ torch.tensor(weight).T + torch.tensor(bias)
        assert not (logits.argmax(2) == k).all(1).any()


def test_a_class_with_a_large_bias_is_near(linear):
    torch.manual_seed(1)
    weight = torch.randn(6, 8).tolist()
    images = torch.rand(30, 1, 2, 4)
    plain = latent_distances(linear(weight, [0.0] * 6), images)
    raised = latent_distances(linear(weight, [0.0, 0.0, 0.5, 0.0, 0.0, 0.0]), images)
    assert raised[2] < plain[2]
    assert all(raised[k] > plain[k] for k in itertools.chain(range(2), range(3, 6)))


def test_the_last_layer_of_a_net_and_no_hook_stays(tiny_net, pictures):
    layer, features = last_layer(tiny_net, pictures)
    assert layer is tiny_net[-1]
    torch.testing.assert_close(layer(features), tiny_net(pictures))
    assert not any(module._forward_hooks for module in tiny_net.modules())


def test_another_ending_has_no_distances_and_a_log_softmax_the_same(tiny_net, pictures):
    assert latent_distances(nn.Sequential(tiny_net, nn.Softmax(1)), pictures) is None
    plain = latent_distances(tiny_net, pictures)
    logs = latent_distances(nn.Sequential(tiny_net, nn.LogSoftmax(1)), pictures)
    assert torch.equal(logs, plain)
