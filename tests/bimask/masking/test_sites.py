"""Masks on vision transformers: one a block, on the residual stream, left behind as gates."""

import copy

import pytest
import torch
from torch import nn

from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.population import PopulationPurifier
from bimask.defences.ims.purify import purify
from bimask.errors import MaskMismatchError
from bimask.masking.frozen import FrozenNet
from bimask.masking.masks import MaskSet, fold, fold_into, masked_forward
from bimask.masking.sites import ChannelGate, sites_of
from bimask.nets import build_net

WIDTH = 12


class Torchs(nn.Module):
    """torch's own encoder layers behind a convolution with a batch norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, WIDTH, 4, 4), nn.BatchNorm2d(WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True)
        self.blocks = nn.ModuleList([copy.deepcopy(layer) for _ in range(2)])
        self.linear = nn.Linear(WIDTH, 5)

    def forward(self, x):
        out = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            out = block(out)
        return self.linear(out.mean(1))


def vision_transformer(name="vit_tiny"):
    statistics = {"mean": [0.3], "std": [0.4]}
    shape = {"in_channels": 1, "num_classes": 5, "image_size": 16}
    return build_net(name, width=WIDTH, **shape, **statistics)


MAKERS = {"torch": Torchs, "torchvision": vision_transformer}


@pytest.fixture(params=sorted(MAKERS))
def model(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MAKERS[request.param]()
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        nn.init.normal_(head.weight)  # torchvision's starts at 0
    return model.eval()


@pytest.fixture
def images():
    return torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def moved(model):
    """Masks away from the identity, each channel by its own."""
    masks = MaskSet.for_model(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        masks.mask.uniform_(0.4, 0.6, generator=generator)
        masks.selection.uniform_(0, 1, generator=generator)
    return masks


def test_the_published_transformer_has_as_many_channels_as_the_authors_mask():
    with torch.device("meta"):
        model = build_net("vit_b_16", in_channels=3, num_classes=10, mean=[0.5] * 3, std=[0.5] * 3)
    sites = sites_of(model)
    assert len(sites) == 12
    assert sum(sites.values()) == 9216
    assert next(iter(sites)) == "net.encoder.layers.encoder_layer_0"


def test_blocks_are_masked_and_not_the_convolution_before_them(model):
    assert set(sites_of(model).values()) == {WIDTH}
    assert len(sites_of(model)) == {Torchs: 2}.get(type(model), 12)


def test_timms_blocks_are_masked():
    pytest.importorskip("timm")
    model = build_net(
        "timm:vit_tiny_patch16_224",
        in_channels=3,
        num_classes=5,
        image_size=32,
        mean=[0.0] * 3,
        std=[1.0] * 3,
    ).eval()
    masks = moved(model)
    assert set(masks.sites.values()) == {192}
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(fold(model, masks)(images), masked_forward(model, masks, images))


def test_a_mask_is_a_factor_on_the_residual_stream(model, images):
    masks = moved(model)
    expected = copy.deepcopy(model)
    for site, factor in masks.keeps().items():
        gate = nn.Identity()
        gate.forward = lambda out, factor=factor: out * factor
        expected.set_submodule(site, nn.Sequential(expected.get_submodule(site), gate))
    masked = masked_forward(model, masks, images)
    torch.testing.assert_close(masked, expected(images), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(masked, model(images), atol=0.01)


@pytest.mark.parametrize("inverse", [False, True])
def test_folding_is_masking_and_leaves_the_model_alone(model, images, inverse):
    masks = moved(model)
    before = copy.deepcopy(model.state_dict())
    folded = fold(model, masks, inverse=inverse)
    with torch.no_grad():
        masked = masked_forward(model, masks, images, inverse=inverse)
        torch.testing.assert_close(folded(images), masked, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    gates = [module for module in folded.modules() if isinstance(module, ChannelGate)]
    assert len(gates) == len(masks.sites)
    assert not any(isinstance(module, ChannelGate) for module in model.modules())


def test_gates_are_in_the_state_dict(model, images):
    masks = moved(model)
    folded = fold(model, masks)
    again = fold(model, MaskSet.for_model(model))
    assert not torch.allclose(again(images), folded(images), atol=0.01)
    again.load_state_dict(folded.state_dict())
    assert torch.equal(again(images), folded(images))
    with pytest.raises(RuntimeError, match="Missing key"):
        copy.deepcopy(model).load_state_dict(folded.state_dict())


def test_fold_into_starts_from_the_model_each_time(model, images):
    masks, target = moved(model), copy.deepcopy(model)
    fold_into(target, model, masks, inverse=True)
    gates = [module for module in target.modules() if isinstance(module, ChannelGate)]
    fold_into(target, model, masks)
    assert [module for module in target.modules() if isinstance(module, ChannelGate)] == gates
    torch.testing.assert_close(target(images), fold(model, masks)(images))


def test_the_prepared_net_answers_under_many_masks_as_under_each(model, images):
    masks = moved(model)
    rows = torch.stack([masks.keep(), masks.keep(inverse=True), torch.ones_like(masks.mask)]).detach()
    net = FrozenNet(model, masks, sample=images)
    with torch.no_grad():
        answers = net(images.repeat(3, 1, 1, 1), rows).split(len(images))
        keep = masked_forward(model, masks, images)
        inverse = masked_forward(model, masks, images, inverse=True)
        for got, expected in zip(answers, (keep, inverse, model(images)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_transformer_is_purified(model, images):
    config = PurifyConfig(
        initialise_rounds=2,
        minimise_rounds=2,
        select_rounds=2,
        inner_steps=2,
        step_size=None,
        initial_selection=0.9,
        mask_lr=0.1,
        selection_weight=0,  # as the authors have it for transformers
    )
    result = purify(model, images, config)
    assert len(result.rounds) == 6
    assert result.masks.mask.unique().numel() > 2
    answers = result.model()(images)
    torch.testing.assert_close(
        answers, masked_forward(model, result.masks, images), rtol=1e-4, atol=1e-5
    )
    tensors = result.masks.tensors()
    again = MaskSet.from_tensors(tensors, sharpness=config.sharpness)
    torch.testing.assert_close(fold(model, again)(images), answers)


def test_members_of_a_population_end_as_alone(model, images):
    def config(lr):
        return PurifyConfig(
            initialise_rounds=2,
            minimise_rounds=2,
            select_rounds=0,
            inner_steps=2,
            step_size=None,
            mask_lr=lr,
        )

    rates = (0.05, 0.1)
    together = PopulationPurifier(model, images, [config(lr) for lr in rates]).run()
    for lr, member in zip(rates, together, strict=True):
        alone = purify(model, images, config(lr))
        torch.testing.assert_close(member.masks.mask, alone.masks.mask, rtol=0, atol=1e-5)
        torch.testing.assert_close(member.masks.selection, alone.masks.selection, rtol=0, atol=1e-5)


def test_masks_of_other_blocks_are_refused(model, images):
    masks = moved(model)
    first = next(iter(masks.sites))
    model.set_submodule(first, nn.Identity())
    with pytest.raises(MaskMismatchError, match=f"{first}' of 12 channels"):
        masked_forward(model, masks, images)
    assert not any(module._forward_hooks for module in model.modules())
