import copy
import functools

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.purify import purify
from bimask.errors import SettingError
from bimask.masking.masks import MaskSet, fold, masked_forward
from bimask.nets import NETS, Normalised, build_net
from bimask.nets.published import halvings

# Small enough for one core; the transformers' width is a multiple of their heads.
WIDTHS = {name: 12 if name.startswith("vit") else 8 for name in NETS}
EACH_NET = pytest.mark.parametrize("name", sorted(NETS))


def build(name, channels=3, classes=10, width=8, size=32):
    statistics = {"mean": [0.5] * channels, "std": [0.25] * channels}
    shape = {"in_channels": channels, "num_classes": classes, "image_size": size}
    return build_net(name, width=width, **shape, **statistics)


def settled(name, channels=1, size=16):
    """A net in eval mode, batch norms with a history, logits that vary by about 1 between images."""
    return copy.deepcopy(_settled(name, channels, size))


@functools.cache
def _settled(name, channels, size):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build(name, channels=channels, width=WIDTHS[name], size=size)
        images = torch.rand(16, channels, size, size)
        for module in model.modules():
            if isinstance(module, StochasticDepth):
                module.p = 0.0
        for _ in range(20):
            model.train()(images)
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        nn.init.normal_(head.weight)  # a transformer's starts at 0
        head.weight /= model.eval()(images).std(0).mean()
    return model


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(
    ("name", "width", "layers", "channels"),
    [
        ("preactresnet18", None, 20, 4800),
        ("preactresnet18", 8, 20, 600),
        ("small_resnet", None, 10, 43 * 16),
        ("small_resnet", 8, 10, 43 * 8),
        ("vgg19_bn", None, 16, 5504),
        ("vgg19_bn", 8, 16, 688),
        ("mobilenet_v3_large", None, 62, 17280),
        ("efficientnet_b3", None, 130, 63728),
        ("convnext_tiny", None, 22, 8064),
        ("convnext_tiny", 12, 22, 1008),
        ("vit_b_16", None, 1, 768),
        ("vit_tiny", None, 1, 192),
    ],
)
def test_number_of_convolutions_and_of_their_channels(name, width, layers, channels):
    convs = convolutions(build(name, width=width))
    assert len(convs) == layers
    assert sum(conv.out_channels for conv in convs) == channels


@pytest.mark.parametrize(("name", "stem"), [("mobilenet_v3_large", 8), ("efficientnet_b3", 24)])
def test_width_is_that_of_the_first_stage(name, stem):
    assert convolutions(build(name, width=stem))[0].out_channels == stem


@EACH_NET
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 16), (3, 16), (1, 32), (3, 32)])
def test_logits_of_any_size_and_channels(name, channels, size):
    model = build(name, channels=channels, classes=7, width=WIDTHS[name], size=size).eval()
    assert model(torch.rand(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", ["preactresnet18", "small_resnet", "vgg19_bn", "efficientnet_b3"])
def test_images_need_not_be_square(name):
    model = build(name, width=8, size=13).eval()
    assert model(torch.rand(2, 3, 20, 13)).shape == (2, 10)


@EACH_NET
def test_logits_do_not_depend_on_the_batch_in_eval_mode(name):
    model, images = settled(name), torch.rand(4, 1, 16, 16)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "times"),
    [(4, 0), (8, 1), (13, 1), (16, 2), (32, 3), (64, 4), (128, 5), (224, 5), (512, 5)],
)
def test_small_images_are_halved_less_often(size, times):
    assert halvings(size) == times


@pytest.mark.parametrize("name", ["convnext_tiny", "efficientnet_b3", "mobilenet_v3_large", "vgg19_bn"])
@pytest.mark.parametrize(("size", "last"), [(16, 4), (32, 4), (128, 4)])
def test_the_last_map_of_a_small_image_has_four_pixels_a_side(name, size, last):
    features = build(name, width=8, size=size).net.features.eval()
    assert features(torch.rand(1, 3, size, size)).shape[-2:] == (last, last)


@pytest.mark.parametrize("name", ["efficientnet_b3", "mobilenet_v3_large"])
def test_at_their_own_size_the_nets_are_torchvisions(name):
    torchs = build(f"torchvision:{name}", width=None, size=224).eval()
    ours = build(name, width=None, size=224).eval()
    ours.load_state_dict(torchs.state_dict())
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(ours(images), torchs(images))


def test_nets_are_initialised_for_short_training_with_sgd():
    norms = [m for m in build("mobilenet_v3_large").modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}
    net = build("convnext_tiny", width=8)
    scales = [value for name, value in net.named_parameters() if name.endswith("layer_scale")]
    assert len(scales) == 18
    assert all((scale == 1).all() for scale in scales)
    linear = next(m for m in net.modules() if isinstance(m, nn.Linear))
    assert linear.weight.std().item() == pytest.approx(8**-0.5, rel=0.3)


@EACH_NET
def test_a_state_dict_makes_another_net_the_same(name):
    model, other = settled(name), build(name, channels=1, width=WIDTHS[name], size=16).eval()
    other.load_state_dict(model.state_dict())
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(other(images), model(images))
    assert len(model(images)[0].unique()) == 10


@EACH_NET
def test_the_seed_decides_the_weights(name):
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        model = build(name, channels=1, width=WIDTHS[name], size=16)
        states.append(torch.cat([value.flatten() for value in model.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@EACH_NET
def test_folding_is_masking(name):
    """In double: under masks, batch norms of an untrained net let logits grow to 1e5."""
    model, images = settled(name).double(), torch.rand(4, 1, 16, 16).double()
    masks = MaskSet.for_model(model)
    with torch.no_grad():
        masks.mask.uniform_(0.45, 0.6)
        masks.selection.uniform_(0.2, 0.8)
        masked = masked_forward(model, masks, images)
        torch.testing.assert_close(fold(model, masks)(images), masked, rtol=1e-7, atol=1e-7)
        assert not torch.allclose(model(images), masked, atol=1e-2)


@EACH_NET
def test_every_net_can_be_purified(name):
    model = settled(name)
    before = copy.deepcopy(model.state_dict())
    config = PurifyConfig(
        initialise_rounds=1,
        minimise_rounds=1,
        select_rounds=1,
        inner_steps=1,
        step_size=None,
        initial_selection=0.9,
    )
    result = purify(model, torch.rand(6, 1, 16, 16), config)
    assert len(result.rounds) == 3
    assert not torch.equal(result.masks.mask, MaskSet.for_model(model).mask)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert result.model()(torch.rand(2, 1, 16, 16)).shape == (2, 10)


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
