"""The training loop's side of an attack, with attacks that keep a diary."""

import pytest
import torch

from bimask.attacks import BadNets, PoisonedBatch
from bimask.data import ImageData
from bimask.errors import NonFiniteError
from bimask.nets.spec import NetSpec
from bimask.victims import VictimSpec
from bimask.victims.training import fit

RECIPE = {
    "fresh_net": NetSpec(net="small_resnet", width=2).fresh_net,
    "epochs": 3,
    "batch_size": 10,
    "lr": 0.01,
    "weight_decay": 0.0,
    "shift": 1,
    "flip": False,
    "precision": "float32",
    "seed": 0,
}


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageData(images, torch.arange(40) % 4, tuple("abcd"))


class Diary(BadNets):
    """Writes down what it is given; learns one number from its penalty."""

    batchwise = True

    def __init__(self):
        super().__init__(size=2)
        self.seen, self.poisoned_ones, self.slopes = [], [], []
        self.number = torch.ones((), requires_grad=True)

    def poison_batch(self, images, labels, num_classes, *, share, generator):
        batch = super().poison_batch(images, labels, num_classes, share=share, generator=generator)
        self.seen.append(images.clone())
        self.poisoned_ones.append(images[batch.roles == 1].clone())
        return PoisonedBatch(batch.images, batch.labels, batch.roles, 3 * self.number)

    def step(self):
        self.slopes.append(self.number.grad.item())
        self.number.grad = None


def weights_of(net):
    return torch.cat([value.flatten().double() for value in net.state_dict().values()])


def test_every_batch_is_clean_poisoned_once_and_followed_by_a_step(data):
    diary = Diary()
    fit(data, attack=diary, share=0.2, **RECIPE)
    assert len(diary.seen) == 3 * 4
    assert all(len(images) == 2 for images in diary.poisoned_ones)
    assert diary.slopes == [3.0] * 12
    stored = {image.numpy().tobytes() for image in data.floats()}
    for epoch in range(3):
        given = [image.numpy().tobytes() for batch in diary.seen[4 * epoch :][:4] for image in batch]
        assert set(given) == stored
        assert len(given) == 40


def test_others_are_poisoned_in_every_epoch(data):
    diary = Diary()
    fit(data, attack=diary, share=0.2, **RECIPE)
    epochs = [
        {image.numpy().tobytes() for batch in diary.poisoned_ones[4 * e :][:4] for image in batch}
        for e in range(3)
    ]
    assert all(len(epoch) == 8 for epoch in epochs)
    assert len(epochs[0] | epochs[1] | epochs[2]) > 12


def test_the_net_learns_what_the_attack_makes_of_the_batch(data):
    with_attack, without = fit(data, attack=Diary(), share=0.2, **RECIPE), fit(data, **RECIPE)
    assert not torch.equal(weights_of(with_attack), weights_of(without))
    # an attack that changes nothing leaves the order and the shifts as they are
    assert torch.equal(weights_of(fit(data, attack=Diary(), share=0.0, **RECIPE)), weights_of(without))


def test_epochs_are_told_with_their_mean_loss(data):
    told = []
    net = fit(data, on_epoch=lambda *of: told.append(of), **RECIPE)
    assert [epoch for epoch, _, _ in told] == [1, 2, 3]
    assert all(loss > 0 and model is net for _, loss, model in told)
    assert not net.training


def test_a_training_that_diverges_is_told(data):
    with pytest.raises(NonFiniteError, match="diverged in epoch .*; lower `lr`"):
        fit(data, **RECIPE | {"lr": 1e20})


@pytest.mark.parametrize(("width", "spread"), [(4, False), (8, False), (16, True)])
def test_nets_too_narrow_for_onednn_keep_their_layout(data, width, spread):
    fresh_net = NetSpec(net="small_resnet", width=width).fresh_net
    net = fit(data, **{**RECIPE, "fresh_net": fresh_net, "epochs": 1})
    widest = max(net.parameters(), key=lambda weight: weight.numel())
    assert widest.is_contiguous(memory_format=torch.channels_last) is spread


def test_sharpness_aware_training_is_seeded_and_without_sharpness_the_plain_one(data):
    plain = weights_of(fit(data, **RECIPE))
    sharp = weights_of(fit(data, sam_rho=0.5, **RECIPE))
    assert not torch.equal(plain, sharp)
    assert torch.equal(sharp, weights_of(fit(data, sam_rho=0.5, **RECIPE)))
    nearly = weights_of(fit(data, sam_rho=1e-9, **RECIPE))
    torch.testing.assert_close(nearly, plain, rtol=0, atol=1e-5)


def test_an_attack_that_learns_from_a_batch_is_refused_with_sharpness():
    with pytest.raises(ValueError, match="input_aware learns from one"):
        VictimSpec(attack={"name": "input_aware"}, sam_rho=1.0)


def test_a_spec_without_sharpness_keeps_its_digest():
    assert "sam_rho" not in VictimSpec().model_dump()
    assert VictimSpec().digest != VictimSpec(sam_rho=1.0).digest
