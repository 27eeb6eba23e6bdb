import pytest
import torch
from torch import nn

from bimask.errors import SettingError
from bimask.nets import NETS, Normalised, build_net


def build(name, channels=3, classes=10, width=8):
    statistics = {"mean": [0.5] * channels, "std": [0.25] * channels}
    return build_net(name, in_channels=channels, num_classes=classes, width=width, **statistics)


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(
    ("name", "width", "layers", "channels"),
    [
        ("preactresnet18", 64, 20, 4800),
        ("preactresnet18", 8, 20, 600),
        ("small_resnet", 16, 10, 43 * 16),
        ("small_resnet", 8, 10, 43 * 8),
    ],
)
def test_number_of_convolutions_and_of_their_channels(name, width, layers, channels):
    convs = convolutions(build(name, width=width))
    assert len(convs) == layers
    assert sum(conv.out_channels for conv in convs) == channels


@pytest.mark.parametrize("name", sorted(NETS))
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 32, 32), (3, 20, 13)])
def test_logits_of_any_size_and_channels(name, channels, height, width):
    model = build(name, channels=channels, classes=7).eval()
    assert model(torch.rand(2, channels, height, width)).shape == (2, 7)


@pytest.mark.parametrize("name", sorted(NETS))
def test_logits_do_not_depend_on_the_batch_in_eval_mode(name):
    model, images = build(name).eval(), torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]), rtol=1e-4, atol=1e-5)


def test_normalisation_is_per_channel():
    model = Normalised(nn.Identity(), [0.5, 0.25], [0.5, 0.125])
    white = model(torch.ones(1, 2, 3, 3))
    assert white[0, 0].unique().tolist() == [1]
    assert white[0, 1].unique().tolist() == [6]


def test_unknown_net_is_refused_with_the_known_ones():
    with pytest.raises(SettingError, match="'resnet999'.*preactresnet18, small_resnet"):
        build("resnet999")


def test_no_channels_are_refused():
    with pytest.raises(SettingError, match="width=0"):
        build("small_resnet", width=0)


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.0]), ([0.5, 0.5], [1.0])])
def test_bad_statistics_are_refused(mean, std):
    with pytest.raises(SettingError, match="`std > 0`"):
        Normalised(nn.Identity(), mean, std)
