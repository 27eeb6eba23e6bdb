import math

import pytest
import torch
from torch import nn

from bimask.defences.unlearning.bti_dbf import BtiDbf, BtiDbfConfig
from bimask.defences.unlearning.decoupling import (
    FeatureMask,
    Parted,
    descend,
    identity_losses,
    inversion_losses,
    mask_losses,
)
from bimask.defences.unlearning.unet import ImageChanger
from bimask.errors import ModelError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def parted():
    """The features are the two pixels; the head is the identity."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(2))
    return Parted(net, torch.rand(2, 1, 1, 2))


def test_the_masks_objective_is_that_of_the_formula(parted):
    """f = (2, 1), y = 0, m = (3/4, 1/4): h(m f) = (1.5, 0.25), h((1 - m) f) = (0.5, 0.75)."""
    losses = mask_losses(
        parted, torch.tensor([0.75, 0.25]), torch.tensor([[2.0, 1.0]]), torch.tensor([0])
    )
    assert losses["kept"].item() == pytest.approx(math.log(1 + math.exp(0.25 - 1.5)))
    assert losses["others"].item() == pytest.approx(-math.log(1 + math.exp(0.75 - 0.5)))


def test_the_mask_begins_at_one_half_and_keeps_what_the_answer_needs(parted):
    mask = FeatureMask(2)
    assert mask().tolist() == [0.5, 0.5]
    optimiser = torch.optim.Adam(mask.parameters(), 0.1)
    features, labels = torch.tensor([[2.0, 1.0]]), torch.tensor([0])
    for _ in range(100):
        descend(optimiser, mask_losses(parted, mask(), features, labels))
    kept, other = mask().tolist()  # the first speaks for the label, the second against it
    assert kept > 0.99
    assert other < 0.01
    mask.reset()
    assert mask().tolist() == [0.5, 0.5]


def test_the_inversions_objective_is_that_of_the_formula():
    clean, changed = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]])  # changes (2, 4)
    losses = inversion_losses(torch.tensor([0.75, 0.5]), clean, changed, bound=3.0)
    assert losses["kept"].item() == pytest.approx((1.5**2 + 2**2) / 2)
    assert losses["others"].item() == pytest.approx(-(0.5**2 + 2**2) / 2)
    assert losses["beyond"].item() == pytest.approx((2**2 + 4**2) / 2 - 3)
    assert inversion_losses(torch.ones(2), clean, changed, bound=11.0)["beyond"] == 0


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 7, 5), (3, 1, 2)])
def test_a_changed_image_is_one_and_stays_near(shape):
    changer = ImageChanger(shape[0], 4, bound=0.01, generator=generator())
    with torch.no_grad():
        changer.last.bias += 5  # a change that is far too large
    images = torch.rand(3, *shape)
    changed = changer(images)
    assert changed.shape == images.shape
    assert 0 <= changed.min() <= changed.max() <= 1
    assert (changed - images).square().flatten(1).mean(1).max() <= 0.01 + 1e-6


def test_the_generators_first_weights_come_from_its_generator_alone():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    one, other = (ImageChanger(1, 4, 0.1, generator(3)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_generator_learns_the_identity_at_first(toy):
    parted = Parted(toy.net.requires_grad_(True), toy.clean.images)
    try:
        changer = ImageChanger(1, 8, 0.02, generator())
        optimiser = torch.optim.Adam(changer.parameters(), 1e-3)
        first = identity_losses(changer, parted, toy.clean.images)
        for _ in range(50):
            descend(optimiser, identity_losses(changer, parted, toy.clean.images))
        last = identity_losses(changer, parted, toy.clean.images)
    finally:
        parted.head._forward_pre_hooks.clear()
    assert last["image"] < 0.01  # 100 times the mean square
    assert last["image"] < first["image"] / 3
    assert last["features"] < first["features"]


class InTheMiddle(nn.Module):
    """Its last linear layer is not the last one that it names, and its head is called by it alone."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = nn.Linear(16, 4)
        self.spare = nn.Linear(7, 7)

    def forward(self, images):
        return self.head(self.body(images.flatten(1)).relu())


def test_a_net_is_parted_in_front_of_the_layer_that_its_logits_come_from():
    net, images = InTheMiddle().eval(), torch.rand(5, 1, 4, 4)
    parted = Parted(net, images)
    assert parted.head is net.head
    features, logits = parted(images)
    assert torch.equal(features, net.body(images.flatten(1)).relu())
    torch.testing.assert_close(parted.answers(features), logits)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh()),
    ],
)
def test_a_net_whose_logits_come_from_no_linear_layer_is_refused(net):
    with pytest.raises(ModelError, match="take another defence, such as `sau`"):
        BtiDbf().check(net.eval(), torch.rand(3, 1, 4, 4))


def test_steps_are_those_of_all_phases():
    config = BtiDbfConfig(
        epochs=2, rounds=3, pretrain_epochs=5, mask_epochs=1, generator_epochs=4, batch_size=8
    )
    assert config.steps(16) == 2 * (5 + 3 * (1 + 4 + 2))


def test_a_square_that_the_net_obeyed_is_found_and_forgotten(toy):
    config = BtiDbfConfig(
        rounds=3, epochs=20, lr=2e-3, mask_lr=0.1, pretrain_epochs=20, width=8, image_bound=0.08
    )
    toy.forgets(BtiDbf(), config)
    assert 1 / 3 <= toy.defended(BtiDbf(), config).numbers["inverted_share"] <= 1
