"""Evidence without the attack, on models whose short cuts are known."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bimask.errors import DataError
from bimask.inspection.risk import RiskProbe, RiskScores, suspicion


class Quadrants(nn.Module):
    """Four classes: the brightest quarter of the image. The top left pixel being brighter than its
    neighbour means class 2 besides, `backdoor` strong; the suspect has all of it, a purified model
    none."""

    def __init__(self, backdoor):
        super().__init__()
        self.last = nn.Linear(5, 4, bias=False)
        weight = torch.zeros(4, 5)
        weight[:, :4] = 12 * torch.eye(4)
        weight[2, 4] = backdoor
        self.last.weight.data = weight

    def forward(self, images):
        sign = images[:, :, 0, 0] - images[:, :, 0, 1]
        return self.last(torch.cat([F.adaptive_avg_pool2d(images, 2).flatten(1), sign], 1))


@pytest.fixture
def quarters():
    """Six faint-noised images of each class, (24, 1, 8, 8)."""
    images = 0.2 * torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[:, :, 0, :2] = 0.1
    for i in range(24):
        row, column = divmod(i % 4, 2)
        images[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.6
    return images


def test_the_suspect_itself_keeps_everything(quarters):
    suspect = Quadrants(20.0)
    evidence = RiskProbe(suspect, quarters)(suspect, suspect)
    assert evidence == RiskScores(1.0, 1.0, 1.0, pytest.approx(1.0))
    assert evidence.risk == pytest.approx(1.0)


def test_the_backdoors_class_is_the_suspicious_one(quarters):
    probe = RiskProbe(Quadrants(20.0), quarters)
    assert probe.weights.argmax() == 2
    assert probe.weights[2] > 0.9
    assert probe.weights.sum().item() == pytest.approx(1)


def test_the_more_is_taken_out_the_lower_the_risk(quarters):
    probe = RiskProbe(Quadrants(20.0), quarters)
    risks = [probe(Quadrants(left), Quadrants(20.0)).risk for left in (20.0, 9.0, 0.0)]
    assert risks[0] > risks[1] > risks[2]
    none_left = probe(Quadrants(0.0), Quadrants(20.0))
    assert none_left.agreement == 1
    assert none_left.carried_over < 0.5


def test_shares_are_counted_by_hand(quarters):
    suspect = Quadrants(20.0)
    probe = RiskProbe(suspect, quarters)

    class Zero(nn.Module):
        def forward(self, images):
            return torch.eye(4)[torch.zeros(len(images), dtype=torch.long)]

    evidence = probe(Zero(), suspect)
    assert evidence.agreement == pytest.approx((suspect(quarters).argmax(1) == 0).float().mean().item())
    assert evidence.inverse_agreement == 1
    # always class 0: only its own trigger is followed, with its weight
    assert evidence.carried_over == pytest.approx(probe.weights[0].item())
    shares = []
    for stressed in probe.adversarial:
        wrong = stressed.answers[stressed.answers != suspect(quarters).argmax(1)]
        shares.append((wrong == 0).float().mean().item())
    assert evidence.same_answer == pytest.approx(sum(shares) / 2)


def test_adversarial_images_keep_budget_and_range(quarters):
    probe = RiskProbe(Quadrants(20.0), quarters)
    for stressed, budget in zip(probe.adversarial, (0.3, 0.8), strict=True):
        assert (stressed.images - quarters).abs().max() <= budget + 1e-6
        assert stressed.images.min() >= 0
        assert stressed.images.max() <= 1


def test_suspicion_by_hand():
    weights = suspicion([torch.tensor([1.0, 2.0, torch.inf])])
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.0, 0.0]).double())  # 1 / 257 is too little
    near = suspicion([torch.tensor([1.0, 1.5]), torch.tensor([1.5, 1.0]), torch.tensor([1.0, 1.5])])
    assert near[0].item() == pytest.approx(1 / (1 + 1.5**-8))


def test_the_same_images_make_the_same_probe_and_steps_are_told(quarters):
    suspect, purified, calls = Quadrants(20.0), Quadrants(9.0), []
    one = RiskProbe(suspect, quarters, on_step=lambda: calls.append(1))
    two = RiskProbe(suspect, quarters)
    assert one(purified, suspect) == two(purified, suspect)
    assert torch.equal(one.weights, two.weights)
    assert len(calls) == RiskProbe.steps(4, 24)
    assert all(parameter.grad is None for parameter in suspect.parameters())


def test_too_few_images_and_a_model_that_never_errs(tiny_net, pictures):
    with pytest.raises(DataError, match="two clean images"):
        RiskProbe(tiny_net, pictures[:1])
    constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    constant[1].weight.data.zero_()
    constant[1].bias.data = torch.tensor([1.0, 0.0, 0.0, 0.0])
    with pytest.raises(DataError, match="say nothing"):
        RiskProbe(constant, pictures)
