"""Which sites a model has, and what masks on them promise, for tiny nets of every family."""

import copy
import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.purify import purify
from bimask.errors import MaskMismatchError
from bimask.masking.coverage import coverage
from bimask.masking.discovery import ALL, candidates, chosen, images_in, masks_for, row_scale
from bimask.masking.frozen import FrozenNet
from bimask.masking.masks import MaskSet, fold, masked_forward
from bimask.masking.sites import HEADS, add_gates, gates_in
from bimask.nets.admission import admit

SPEC = importlib.util.spec_from_file_location("families", Path(__file__).parents[1] / "families.py")
families = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(families)
FAMILIES, CLASSES = families.FAMILIES, families.CLASSES

CASES = [(name, "all") for name in FAMILIES] + [
    (name, "published") for name, family in FAMILIES.items() if family.published
]
every_family = pytest.mark.parametrize("name", FAMILIES)
every_case = pytest.mark.parametrize(("name", "which"), CASES)
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


@functools.cache
def _admitted(name, dtype):
    family = FAMILIES[name]
    if family.needs is not None:
        pytest.importorskip(family.needs)
    images = families.pictures(family, dtype=dtype)
    admitted = admit(families.built(family, dtype=dtype), images)
    admitted.model.requires_grad_(False)  # as in a purification
    return admitted, images


def let_in(name, dtype=torch.float32):
    """A model of a family behind its door, and images; no test changes them."""
    admitted, images = _admitted(name, dtype)
    return admitted.model, images


@functools.cache
def _masks(name, which, dtype):
    return masks_for(*let_in(name, dtype), which)


def blank(name, which, dtype=torch.float32):
    """Masks at the identity."""
    return copy.deepcopy(_masks(name, which, dtype))


def moved(masks, seed=0):
    """Masks away from the identity, each channel by its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values, low in ((masks.mask, 0.3), (masks.selection, 0.1)):
            values.copy_(torch.rand(len(values), generator=generator) * 0.6 + low)
    return masks


def differs_by(got, expected):
    """The largest difference, as a share of the row's scale."""
    return ((got - expected).abs() / row_scale(expected)).max().item()


def snapshot(model):
    """All that hooks or replaced submodules would change."""
    return [
        (name, id(module), module.training, [list(h) for h in _hooks(module)])
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def _hooks(module):
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
        module._state_dict_hooks,
    )


# --- which sites ---


@every_family
def test_sites_of_every_kind_are_found_but_none_at_the_logits(name):
    family, (model, images) = FAMILIES[name], let_in(name)
    found = candidates(model, images)
    assert " ".join(sorted({site.kind for site in found})) == family.kinds
    keys = {site.key for site in found}
    assert len(keys) == len(found)
    assert not keys & set(family.last)
    layers = {
        layer
        for layer, module in model.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear, nn.Embedding))
    }
    missed = layers - {site.module for site in found} - set(family.last)
    assert missed == set(family.unseen)
    assert [site.key for site in chosen(model, images, "all")] == [
        site.key for site in found if site.kind in ALL
    ]


@every_family
def test_published_sites(name):
    family, (model, images) = FAMILIES[name], let_in(name)
    if not family.published:
        with pytest.raises(MaskMismatchError, match="`sites: all` masks"):
            masks_for(model, images)
    else:
        assert len(blank(name, "published").sites) == family.published


@every_family
def test_heads_are_found(name):
    family, (model, images) = FAMILIES[name], let_in(name)
    heads = [site for site in candidates(model, images) if site.kind == "heads"]
    assert tuple(site.channels for site in heads) == family.heads
    for site in heads:
        assert site.key == site.module + HEADS
        last = site.module.rpartition(".")[2]
        assert last in ("out_proj", "proj", "output", "o_proj", "dense")


@every_case
def test_folding_puts_gates_where_no_weights_take_masks(name, which):
    family, (model, _) = FAMILIES[name], let_in(name)
    masks = blank(name, which)
    gated = gates_in(fold(model, masks))
    blocks = {key for key, site in masks.places_in(model).items() if site.kind == "block"}
    if which == "all":
        assert not blocks
        assert tuple(gated) == family.gates
    elif blocks:
        assert set(gated) == blocks == set(masks.sites)
    else:
        assert gated == [key for key in family.gates if key in {*masks.sites, "features.3"}]


def test_what_counts_images_is_told_from_tokens():
    model, images = let_in("torch's encoder, tokens first")
    sites = candidates(model, images)
    where = images_in(model, sites, images)
    assert {where[site.key] for site in sites if site.module.startswith("encoder")} == {1}
    assert where["stem"] == 0
    model, images = let_in("torch's encoder")
    assert set(images_in(model, candidates(model, images), images).values()) == {0}


class Fed(nn.Module):
    """One convolution on what `feed` makes of images, and another one on the images."""

    def __init__(self, feed, gather=lambda maps, _count: maps):
        super().__init__()
        self.feed, self.gather = feed, gather
        self.conv, self.other = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.hidden, self.fc = nn.Linear(6, 7), nn.Linear(7, CLASSES)

    def forward(self, x):
        maps = self.gather(self.conv(self.feed(x)), len(x)) + self.other(x)
        return self.fc(torch.relu(self.hidden(torch.relu(maps).mean((2, 3)))))


@pytest.mark.parametrize("which", ["published", "all"])
@pytest.mark.parametrize(
    ("model", "masked"),
    [
        (Fed(lambda x: x), True),
        (Fed(lambda x: torch.full_like(x[:1], 0.3)), False),  # of no image
        (Fed(lambda x: torch.full_like(x[:2], 0.3), lambda maps, _n: maps[:1]), False),
        # copies of an image beside it; copies behind all images
        (Fed(lambda x: torch.stack([x, x.flip(3)], 1).flatten(0, 1), lambda maps, _n: maps[::2]), True),
        (Fed(lambda x: torch.cat([x, x.flip(3)]), lambda maps, n: maps[:n] + maps[n:]), False),
    ],
)
@torch.no_grad()
def test_only_values_of_images_one_by_one_are_masked(model, masked, which):
    model.eval()
    images = families.pictures(FAMILIES["two convs"])
    masks = moved(masks_for(model, images, which))
    assert ("conv" in masks.sites) == masked
    assert "other" in masks.sites
    rows = torch.stack([masks.keep(), masks.keep(inverse=True)])
    got = FrozenNet(model, masks, sample=images)(torch.cat([images, images]), rows)
    expected = [masked_forward(model, masks, images, inverse=side) for side in (False, True)]
    assert differs_by(got, torch.cat(expected)) <= 1e-5


def test_a_layer_that_sees_an_image_and_its_neighbour_is_no_site():
    model = Fed(lambda x: x + 0.1 * x.roll(1, 0)).eval()
    images = families.pictures(FAMILIES["two convs"])
    assert list(masks_for(model, images).sites) == ["other"]
    assert list(masks_for(model, images, "all").sites) == ["other"]


def test_a_layer_that_sees_images_and_a_constant_is_no_site():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, CLASSES)

        def forward(self, x):
            constant = torch.full_like(x[:1], 0.3)
            return self.fc(torch.relu(self.conv(x) + self.conv(constant)).mean((2, 3)))

    for which in ("published", "all"):
        with pytest.raises(MaskMismatchError, match="No site to mask"):
            masks_for(Both().eval(), families.pictures(FAMILIES["two convs"]), which)


@every_family
def test_coverage_counts_what_all_reaches(name):
    family, (model, images) = FAMILIES[name], let_in(name)
    reach = coverage(model, blank(name, "all"), images)
    assert reach.sites == 1
    assert 0 < reach.parameters <= 1
    assert sum(reach.kinds.values()) == len(blank(name, "all").sites)
    assert set(reach.unmasked) >= set(family.unseen)


# --- what masks on them promise ---


@every_case
def test_masks_begin_at_the_identity_bit_for_bit(name, which):
    model, images = let_in(name)
    masks = blank(name, which)
    assert torch.equal(masks.keep(), torch.ones_like(masks.mask))
    model = copy.deepcopy(model).requires_grad_()  # torch's fused attention rounds in another way
    plain = model(images)
    assert plain.shape == (len(images), CLASSES)
    assert plain.std(0).mean() > 0.01
    for inverse in (False, True):
        assert torch.equal(masked_forward(model, masks, images, inverse=inverse), plain)


@every_case
def test_keep_and_inverse_share_out_what_the_selection_leaves(name, which):
    masks = moved(blank(name, which, torch.float64))
    sides = masks.keep() + masks.keep(inverse=True)
    torch.testing.assert_close(sides, 1 + masks.selection, rtol=0, atol=1e-15)
    together = torch.cat([*masks.keeps().values()])
    assert torch.equal(together, masks.keep())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@every_case
@torch.no_grad()
def test_folding_is_masking(name, which, dtype, bound):
    model, images = let_in(name, dtype)
    before = copy.deepcopy(model.state_dict())
    for inverse in (False, True):
        masks = moved(blank(name, which, dtype), seed=int(inverse))
        expected = masked_forward(model, masks, images, inverse=inverse)
        assert differs_by(expected, model(images)) > 1e-3
        assert differs_by(fold(model, masks, inverse=inverse)(images), expected) <= bound
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@every_case
@torch.no_grad()
def test_the_prepared_net_answers_blocks_as_each_is_masked(name, which, dtype, bound):
    model, images = let_in(name, dtype)
    one, other = (moved(blank(name, which, dtype), seed) for seed in (0, 1))
    net = FrozenNet(model, one, sample=images)
    factors = torch.stack([one.keep(), other.keep(inverse=True), torch.ones_like(one.mask)])
    answers = net(images.repeat(3, 1, 1, 1), factors).split(len(images))
    expected = (
        masked_forward(model, one, images),
        masked_forward(model, other, images, inverse=True),
        model(images),
    )
    for got, wanted in zip(answers, expected, strict=True):
        assert differs_by(got, wanted) <= bound
    assert differs_by(net(images), expected[-1]) <= bound


@every_case
def test_a_gradient_reaches_every_site(name, which):
    model, images = let_in(name, torch.float64)
    masks = moved(blank(name, which, torch.float64))
    logits = masked_forward(model, masks, images)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits)
    slopes = torch.autograd.grad((logits * direction).sum(), [masks.mask, masks.selection])
    for slope in slopes:
        assert slope.isfinite().all()
        dead = [key for key, values in masks.by_site(slope).items() if not values.abs().max() > 0]
        assert not dead


@every_case
def test_the_prepared_nets_gradient_is_that_of_the_masked_model(name, which):
    model, images = let_in(name, torch.float64)
    masks = moved(blank(name, which, torch.float64))
    net = FrozenNet(model, masks, sample=images)
    factor = masks.keep().detach().requires_grad_()
    moving = images.clone().requires_grad_()
    got = torch.autograd.grad(net(moving, factor[None]).square().sum(), [moving, factor])
    masked = masked_forward(model, masks, moving).square().sum()
    (wanted,) = torch.autograd.grad(masked, moving, retain_graph=True)
    torch.testing.assert_close(got[0], wanted, rtol=1e-8, atol=1e-8 * wanted.abs().max().item())
    (wanted,) = torch.autograd.grad(masked, masks.mask)
    (through,) = torch.autograd.grad(masks.keep(), masks.mask, got[1])
    torch.testing.assert_close(through, wanted, rtol=1e-8, atol=1e-8 * wanted.abs().max().item())


@every_case
def test_nothing_stays_behind_an_exception(name, which):
    model, images = let_in(name)
    masks = blank(name, which)
    last = model.get_submodule(next(reversed(masks.places_in(model).values())).module)

    def fail(_module, _inputs, _out):
        raise ArithmeticError("in the forward")

    handle = last.register_forward_hook(fail)
    fused = torch.backends.mha.get_fastpath_enabled()
    before = snapshot(model)
    try:
        for action in (
            lambda: masked_forward(model, masks, images),
            lambda: candidates(model, images),
            lambda: masks_for(model, images, which),
        ):
            with pytest.raises(ArithmeticError, match="in the forward"):
                action()
            assert snapshot(model) == before
            assert torch.backends.mha.get_fastpath_enabled() == fused
    finally:
        handle.remove()


@every_family
def test_finding_and_folding_leave_the_model_as_it_is(name):
    model, images = let_in(name)
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    masks = masks_for(model, images, "all")
    fold(model, masks)
    FrozenNet(model, masks, sample=images)
    assert snapshot(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["weight norm, old", "pruned"])
@pytest.mark.parametrize("prepared", [False, True])
def test_weights_that_were_computed_with_gradients_are_no_hindrance(name, prepared):
    family = FAMILIES[name]
    model, images = families.built(family), families.pictures(family)
    masks = moved(masks_for(model, images, "all"))
    logits = masked_forward(model, masks, images)
    assert not model.layer.weight.is_leaf  # `copy.deepcopy` takes no such tensor
    with torch.no_grad():
        if prepared:
            got = FrozenNet(model, masks, sample=images)(images, masks.keep()[None])
        else:
            got = fold(model, masks)(images)
    assert differs_by(got, logits) <= 1e-5


@every_family
def test_the_weights_of_a_folded_model_load_into_another(name):
    family, (model, images) = FAMILIES[name], let_in(name)
    admitted, _ = _admitted(name, torch.float32)
    masks = moved(blank(name, "all"))
    folded = fold(model, masks)
    other = families.built(family, seed=7).requires_grad_(False)  # a matmul looks at it
    admitted.door.install(other)
    with torch.no_grad():
        assert differs_by(other(images), model(images)) > 1e-3
        if gates := gates_in(folded):
            assert tuple(gates) == family.gates
            add_gates(other, gates)
        other.load_state_dict(folded.state_dict(), strict=True)
        assert torch.equal(other(images), folded(images))


@every_family
def test_saved_masks_come_back(name):
    model, images = let_in(name)
    masks = moved(blank(name, "all"))
    again = MaskSet.from_tensors(masks.tensors(), sharpness=masks.sharpness)
    assert list(again.sites.items()) == list(masks.sites.items())
    assert again.gates == masks.gates
    with torch.no_grad():
        assert torch.equal(fold(model, again)(images), fold(model, masks)(images))
        assert torch.equal(masked_forward(model, again, images), masked_forward(model, masks, images))


# --- names ---


def keys(name, *patterns):
    return [site.key for site in chosen(*let_in(name), patterns)]


def test_sites_are_named_by_kind_and_by_pattern():
    assert keys("lenet, view", "conv") == ["conv1", "conv2"]
    assert keys("lenet, view", "fc*") == ["fc1@features", "fc1", "fc2"]
    assert keys("lenet, view", "linear", "conv2") == ["conv2", "fc1", "fc2"]
    assert keys("lenet, view", "*@features") == ["fc1@features"]
    assert keys("lenet, view", "features") == ["fc1@features"]
    assert keys("lenet, view", "fc1") == ["fc1"]
    assert keys("vit, joined", "heads") == [f"blocks.{n}.attention.proj@heads" for n in range(2)]
    assert keys("vit, joined", "*.qkv") == [f"blocks.{n}.attention.qkv" for n in range(2)]
    assert keys("vit, joined", "projection") == [f"blocks.{n}.attention.qkv" for n in range(2)]
    assert keys("words", "embedding") == ["table"]
    blocks = keys("vit, torchvision", "block", "conv")
    assert blocks == ["conv_proj", *(f"encoder.layers.encoder_layer_{n}" for n in range(2))]


@pytest.mark.parametrize("name", ["vit, joined", "vit, torchvision", "lenet, view", "words"])
def test_every_site_can_be_masked_alone(name):
    model, images = let_in(name, torch.float64)
    for site in candidates(model, images):
        # in brackets, so that a site named "norm" is not taken for the kind
        masks = moved(masks_for(model, images, (f"{site.key[:-1]}[{site.key[-1]}]",)))
        assert list(masks.sites) == [site.key]
        with torch.no_grad():
            expected = masked_forward(model, masks, images)
            assert differs_by(expected, model(images)) > 1e-6
            assert differs_by(fold(model, masks)(images), expected) <= 1e-12


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("conv11", "conv1"), ("liner", "linear"), ("fc1@feature", "fc1@features"), ("zzz", "lists them")],
)
def test_a_name_that_no_site_has_is_refused_with_those_that_are_near(pattern, near):
    with pytest.raises(MaskMismatchError) as refused:
        keys("lenet, view", "conv", pattern)
    assert repr(pattern) in str(refused.value)
    assert near in str(refused.value).partition(";")[2]
    assert "\n" not in str(refused.value)


def test_the_last_layer_cannot_be_named():
    with pytest.raises(MaskMismatchError, match="'fc3'.*did you mean fc"):
        keys("lenet, view", "fc3")


# --- purified ---


@every_family
def test_every_family_is_purified(name):
    images = families.pictures(FAMILIES[name])
    admitted, _ = _admitted(name, torch.float32)
    config = PurifyConfig(
        profile="fast",
        sites="all",
        precision="float32",
        initialise_rounds=1,
        minimise_rounds=0,
        select_rounds=1,
    )
    result = purify(admitted.plain, images, config, generator=torch.Generator().manual_seed(0))
    assert len(result.rounds) == 2
    assert result.changed
    assert result.masks.gates == blank(name, "all").gates
    folded = result.model()
    admitted.door.install(folded)
    with torch.no_grad():
        expected = masked_forward(admitted.model, result.masks, images)
        assert differs_by(folded(images), expected) <= 1e-5
