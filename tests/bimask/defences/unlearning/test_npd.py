import math

import pytest
import torch
from torch import nn

from bimask.cleaned.before_after import before_after
from bimask.cleaned.export import export_onnx
from bimask.cleaned.folder import load_cleaned, save_cleaned
from bimask.defences.base import CleanData
from bimask.defences.purify import defend
from bimask.defences.unlearning.npd import (
    Npd,
    NpdConfig,
    best_wrong,
    folded,
    identity,
    layer_in,
    outer_losses,
    perturbed,
    projected,
)
from bimask.errors import ModelError, SettingError
from bimask.inspection.suspect import CleanImages, Suspect
from bimask.masking.inserted import Polarised, inserted_in, put_around
from bimask.nets import build_net
from bimask.nets.spec import NetSpec


class Backwards(nn.Module):
    """It calls its convolutions in another order than it names them, and one of them not at all."""

    def __init__(self):
        super().__init__()
        self.late = nn.Conv2d(4, 4, 3, padding=1)
        self.early = nn.Conv2d(1, 4, 3, padding=1)
        self.never = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        return self.head(self.late(self.early(images).relu()).relu().mean((2, 3)))


@pytest.fixture
def backwards():
    torch.manual_seed(0)
    return Backwards().eval()


def test_the_last_convolution_that_is_called_is_found_and_another_can_be_named(backwards):
    images = torch.rand(2, 1, 8, 8)
    assert layer_in(backwards, images, "") == "late"
    assert layer_in(backwards, images, "early") == "early"
    with pytest.raises(SettingError, match="'never'.*are early, late"):
        layer_in(backwards, images, "never")


def test_a_net_without_convolutions_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    with pytest.raises(ModelError, match="take another defence, such as `ft_sam`"):
        Npd().check(net, torch.rand(2, 1, 4, 4))


@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_polariser_is_the_identity(toy, training):
    images = toy.clean.images
    polariser = identity(toy.net, "4", images)
    features = toy.net[:4](images)
    one = folded(polariser)
    polariser.train(training)
    torch.testing.assert_close(polariser(features), features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one(features), features, atol=1e-6, rtol=1e-6)
    net = nn.Sequential(*toy.net).eval()
    put_around(net, "4", Polarised(net[4], one))
    try:
        torch.testing.assert_close(net(images), toy.net(images), atol=1e-5, rtol=1e-6)
    finally:
        put_around(net, "4", net[4].block)


def test_a_channel_that_is_always_zero_stays_so(backwards):
    with torch.no_grad():
        backwards.early.bias[2] = -1e3
    images = torch.rand(5, 1, 8, 8)
    one = folded(identity(backwards, "late", images))
    torch.testing.assert_close(one.weight.flatten(1), torch.eye(4), atol=1e-6, rtol=0)
    assert one.bias.abs().max() < 1e-6


def test_the_norm_is_folded_exactly():
    torch.manual_seed(0)
    polariser = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3))
    norm = polariser[1]
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean):
            value.normal_()
        norm.running_var.uniform_(0.1, 2)
    features = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(folded(polariser)(features), polariser.eval()(features))


def test_the_projection_is_to_the_nearest_point_of_the_ball():
    changes = torch.tensor([[[[3.0, 4.0]]], [[[0.3, 0.4]]], [[[0.0, 0.0]]]])
    found = projected(changes, 2.0)
    assert found[0].flatten().tolist() == pytest.approx([1.2, 1.6])
    assert torch.equal(found[1:], changes[1:])


@pytest.mark.parametrize("budget", [0.25, 3.0])
def test_perturbed_images_stay_in_the_ball_and_in_the_range_of_images(backwards, budget):
    images, target = torch.rand(7, 1, 8, 8), torch.arange(7) % 3
    config = NpdConfig(budget=budget, inner_steps=3, success=1.0)
    moved, steps = perturbed(backwards, images, target, config)
    assert (moved - images).flatten(1).norm(dim=1).max() <= budget + 1e-5
    assert 0 <= moved.min() < moved.max() <= 1
    assert steps == 3
    before = nn.functional.cross_entropy(backwards(images), target)
    assert nn.functional.cross_entropy(backwards(moved), target) < before


def test_a_perturbation_ends_where_it_has_enough_success(backwards):
    images = torch.rand(10, 1, 8, 8)
    target = backwards(images).argmax(1)
    target[:4] = (target[:4] + 1) % 3  # six of ten are there before the first step
    moved, steps = perturbed(backwards, images, target, NpdConfig(success=0.6))
    assert steps == 0
    assert torch.equal(moved, images)
    assert perturbed(backwards, images, target, NpdConfig(success=0.61))[1] > 0


def test_the_four_losses_are_those_of_the_formulas():
    clean = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1]]).log()
    robust = torch.tensor([[0.3, 0.6, 0.1], [0.25, 0.5, 0.25]]).log()
    labels, target = torch.tensor([0, 1]), torch.tensor([2, 0])
    assert best_wrong(robust, labels).tolist() == [1, 0]
    config = NpdConfig(clean_weight=2.0, robust_weight=0.5, wrong_weight=3.0, target_weight=4.0)
    losses = {k: v.item() for k, v in outer_losses(clean, robust, labels, target, config).items()}
    assert losses == pytest.approx(
        {
            "cross_entropy": -2.0 * (math.log(0.8) + math.log(0.7)) / 2,
            "robust_cross_entropy": -0.5 * (math.log(0.3) + math.log(0.5)) / 2,
            "wrong": -3.0 * (math.log(1 - 0.6) + math.log(1 - 0.25)) / 2,
            "target": -4.0 * (math.log(1 - 0.1) + math.log(1 - 0.25)) / 2,
        }
    )


def test_the_result_is_one_named_module_and_all_else_is_the_suspects(toy):
    result = toy.defended(Npd(), NpdConfig(epochs=2))
    assert {k: tuple(v.shape) for k, v in result.tensors.items()} == {
        "4.polariser.weight": (8, 8, 1, 1),
        "4.polariser.bias": (8,),
    }
    defended = result.model()
    assert inserted_in(defended) == {"4": "polariser"}
    own = toy.net.state_dict()
    rest = {k.replace("4.block.", "4."): v for k, v in defended.state_dict().items()}
    assert all(torch.equal(rest[name], value) for name, value in own.items())


def test_the_module_is_saved_listed_loaded_and_exported(tmp_path):
    torch.manual_seed(0)
    model = build_net(
        "small_resnet",
        in_channels=3,
        num_classes=4,
        width=8,
        image_size=16,
        mean=[0.5] * 3,
        std=[0.5] * 3,
    ).eval()
    pixels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    clean = CleanImages(pixels, torch.arange(12) % 4)
    spec = NetSpec(net="small_resnet", width=8)
    suspect = Suspect(spec, model, clean, tuple("abcd"), "0" * 64)
    images = clean.floats()
    result = defend(model, images, NpdConfig(epochs=10, lr=0.1), labels=clean.labels)
    looked = before_after(model, result.model(), images, None)
    manifest = save_cleaned(tmp_path / "out", suspect, result, looked, seed=0)
    (inserted,) = manifest["inserted"].items()
    place = next(iter(result.tensors)).rpartition(".polariser.")[0]
    assert inserted == (place.removeprefix("net."), "polariser"), "a folder has the net's own names"
    read = load_cleaned(tmp_path / "out")
    assert torch.equal(read.model(images), result.model()(images))
    assert not torch.allclose(read.model(images), model(images), atol=1e-3)
    export_onnx(read.model, images, tmp_path / "model.onnx")


def test_one_image_alone_in_front_of_a_single_place_can_be_learned_on():
    net = nn.Sequential(nn.Conv2d(1, 4, 4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten()).eval()
    images, labels = torch.rand(1, 1, 4, 4), torch.zeros(1, dtype=torch.long)
    config = NpdConfig(epochs=1, layer="2")
    assert defend(net, images, config, labels=labels).changed


def test_a_layer_that_is_not_there_is_refused(toy):
    clean: CleanData = toy.clean
    with pytest.raises(SettingError, match="name one of them"):
        defend(toy.net, clean.images, NpdConfig(layer="conv1"), labels=clean.labels)


def test_a_square_that_the_net_obeyed_is_filtered_out(toy):
    toy.forgets(Npd(), NpdConfig(epochs=50, lr=0.03))
