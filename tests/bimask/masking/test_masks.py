import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from bimask.errors import MaskMismatchError, SettingError
from bimask.masking.masks import InvertibleMask, MaskSet, fold, fold_into, keep_factor, masked_forward

unit = st.floats(0, 1)
SIDES = pytest.mark.parametrize("inverse", [False, True])


def random_masks(model, seed=0):
    """Masks far from the identity, of the dtype of `model`."""
    masks = MaskSet.for_model(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in (masks.mask, masks.selection):
            values.copy_(torch.rand(values.shape, generator=generator, dtype=values.dtype))
    return masks


def hooks_of(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]


@given(mask=unit, selection=unit, sharpness=st.floats(0.1, 1000))
def test_both_sides_add_up_to_one_plus_selection(mask, selection, sharpness):
    masks = InvertibleMask(1, sharpness=sharpness, mask=mask, selection=selection).double()
    keep, inverse = masks.keep(), masks.keep(inverse=True)
    torch.testing.assert_close(keep + inverse, 1 + masks.selection, rtol=0, atol=1e-12)
    for factor in (keep, inverse):
        assert masks.selection.item() - 1e-12 <= factor.item() <= 1 + 1e-12


@given(mask=unit, selection=unit)
def test_inverse_is_the_keep_of_the_mirrored_mask(mask, selection):
    masks = InvertibleMask(1, mask=mask, selection=selection).double()
    mirrored = InvertibleMask(1, selection=selection).double()
    mirrored.mask.data = 1 - masks.mask.data
    torch.testing.assert_close(masks.keep(inverse=True), mirrored.keep(), rtol=0, atol=1e-12)


def test_keep_by_hand():
    masks = InvertibleMask(3, sharpness=20).double()
    masks.mask.data = torch.tensor([0.5, 0.6, 0.6], dtype=torch.float64)
    masks.selection.data = torch.tensor([0.0, 0.0, 0.5], dtype=torch.float64)
    sigma = 0.8807970779778823  # sigmoid(2)
    wanted = torch.tensor([0.5, sigma, (1 + sigma) / 2], dtype=torch.float64)
    torch.testing.assert_close(masks.keep().detach(), wanted, rtol=0, atol=1e-15)


@SIDES
def test_factors_of_members_are_those_of_each_with_its_own_sharpness(inverse):
    generator = torch.Generator().manual_seed(0)
    a, s = torch.rand(2, 3, 7, generator=generator, dtype=torch.float64)
    k = torch.tensor([[1.0], [20.0], [300.0]], dtype=torch.float64)
    together = keep_factor(a, s, k, inverse=inverse)
    for row in range(3):
        masks = InvertibleMask(7, sharpness=k[row].item()).double()
        masks.mask.data, masks.selection.data = a[row], s[row]
        torch.testing.assert_close(
            together[row], masks.keep(inverse=inverse).detach(), rtol=0, atol=1e-15
        )


@SIDES
def test_straight_through_decides_with_the_slope_of_the_soft_mask(inverse):
    values = torch.tensor([0.0, 0.3, 0.49, 0.51, 0.7, 1.0], dtype=torch.float64)
    masks = [InvertibleMask(6, straight_through=hard).double() for hard in (False, True)]
    for mask in masks:
        mask.mask.data, mask.selection.data = values.clone(), torch.full_like(values, 0.25)
        mask.keep(inverse=inverse).sum().backward()
    soft, hard = masks
    kept = [0.25] * 3 + [1.0] * 3
    assert hard.keep(inverse=inverse).tolist() == (kept[::-1] if inverse else kept)
    torch.testing.assert_close(hard.mask.grad, soft.mask.grad, rtol=0, atol=1e-15)
    # s holds up what is dropped, and only that
    assert hard.selection.grad.tolist() == [float(k < 1) for k in hard.keep(inverse=inverse)]


@SIDES
def test_masks_are_the_identity_at_the_start(tiny_net, pictures, inverse):
    masks = MaskSet.for_model(tiny_net)
    assert masks.keep(inverse=inverse).tolist() == [1.0] * 20
    assert torch.equal(masked_forward(tiny_net, masks, pictures, inverse=inverse), tiny_net(pictures))


@SIDES
def test_only_the_selection_has_a_gradient_at_the_start(inverse):
    masks = InvertibleMask(4).double()
    masks.keep(inverse=inverse).sum().backward()
    assert masks.mask.grad.tolist() == [0.0] * 4
    wanted = torch.sigmoid(torch.tensor(10.0 if inverse else -10.0, dtype=torch.float64))
    torch.testing.assert_close(masks.selection.grad, wanted.expand(4), rtol=0, atol=1e-12)


@SIDES
def test_the_mask_has_a_gradient_below_a_selection_of_one(inverse):
    masks = InvertibleMask(1, mask=0.5, selection=0.0).double()
    masks.keep(inverse=inverse).sum().backward()
    assert masks.mask.grad.item() == (-5 if inverse else 5)  # k / 4


def test_clamp_brings_both_variables_back():
    masks = InvertibleMask(3)
    masks.mask.data, masks.selection.data = torch.tensor([-1, 0.5, 2]), torch.tensor([1.5, -0.1, 0.3])
    masks.clamp_()
    assert masks.mask.tolist() == [0, 0.5, 1]
    assert masks.selection.tolist() == [1, 0, pytest.approx(0.3)]


@pytest.mark.parametrize(
    "values", [{"sharpness": 0}, {"sharpness": float("nan")}, {"mask": 1.1}, {"selection": -0.1}]
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(SettingError, match=next(iter(values))):
        InvertibleMask(2, **values)


def test_every_convolution_is_a_site_in_module_order(tiny_net):
    masks = MaskSet.for_model(tiny_net.double())
    assert masks.sites == {"0": 6, "3": 6, "6": 8}
    assert list(masks.sites) == ["0", "3", "6"]
    assert masks.mask.dtype == torch.float64
    assert [len(selection) for selection in masks.selections()] == [6, 6, 8]


def test_sites_get_their_own_part_of_the_vector():
    masks = MaskSet({"a": 2, "b": 3}, selection=0.0)
    masks.mask.data = torch.linspace(0, 1, 5)
    keep = masks.keep()
    keeps = masks.keeps()
    assert torch.equal(keeps["a"], keep[:2])
    assert torch.equal(keeps["b"], keep[2:])


@SIDES
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_folded_is_masked_and_neither_is_the_original(tiny_net, pictures, dtype, tolerance, inverse):
    model, images = tiny_net.to(dtype), pictures.to(dtype)
    masks = random_masks(model)
    masked = masked_forward(model, masks, images, inverse=inverse)
    folded = fold(model, masks, inverse=inverse)
    torch.testing.assert_close(folded(images), masked, rtol=tolerance, atol=tolerance)
    assert (masked - model(images)).abs().max() > 0.1
    other_side = masked_forward(model, masks, images, inverse=not inverse)
    assert (masked - other_side).abs().max() > 0.1


def test_masked_is_the_net_written_out_with_factors(tiny_net, pictures):
    masks = random_masks(tiny_net)
    keeps = masks.keeps()
    out = pictures
    for name, layer in tiny_net.named_children():
        out = layer(out)
        if name in keeps:
            out = out * keeps[name].view(1, -1, 1, 1)
    torch.testing.assert_close(masked_forward(tiny_net, masks, pictures), out)


def test_fold_scales_weights_and_biases_and_nothing_else(tiny_net):
    masks = random_masks(tiny_net)
    folded = fold(tiny_net, masks).state_dict()
    for name, original in tiny_net.state_dict().items():
        layer, kind = name.rsplit(".", 1)
        if layer in masks.sites:
            factor = masks.keeps()[layer].detach()
            column = factor.view(-1, 1, 1, 1) if kind == "weight" else factor
            torch.testing.assert_close(folded[name], original * column)
            assert not torch.equal(folded[name], original)
        else:
            assert torch.equal(folded[name], original)


def test_fold_leaves_its_argument_bit_for_bit(tiny_net, pictures):
    before = copy.deepcopy(tiny_net.state_dict())
    logits = tiny_net(pictures)
    folded = fold(tiny_net, random_masks(tiny_net))
    with torch.no_grad():
        for value in folded.parameters():
            value.zero_()  # no memory is shared either
    assert all(torch.equal(value, before[name]) for name, value in tiny_net.state_dict().items())
    assert torch.equal(tiny_net(pictures), logits)


def test_fold_gives_a_plain_model_of_the_same_modules(tiny_net):
    folded = fold(tiny_net, random_masks(tiny_net))
    assert [type(m) for m in folded.modules()] == [type(m) for m in tiny_net.modules()]
    assert not hooks_of(folded)
    assert all(value.requires_grad for value in folded.parameters())


def test_fold_into_starts_from_the_model_each_time(tiny_net, pictures):
    target = copy.deepcopy(tiny_net)
    for seed in range(3):
        masks = random_masks(tiny_net, seed)
        fold_into(target, tiny_net, masks, inverse=True)
        wanted = fold(tiny_net, masks, inverse=True)
        assert torch.equal(target(pictures), wanted(pictures))


def test_gradients_reach_masks_and_images(tiny_net, pictures):
    masks = random_masks(tiny_net)
    images = pictures.clone().requires_grad_()
    masked_forward(tiny_net, masks, images).square().sum().backward()
    for gradient in (masks.mask.grad, masks.selection.grad, images.grad):
        assert (gradient != 0).float().mean() > 0.5


def test_no_hook_stays_behind(tiny_net, pictures):
    tiny_net[2].register_forward_hook(lambda *_: None)  # the user's own
    masked_forward(tiny_net, random_masks(tiny_net), pictures)
    assert len(hooks_of(tiny_net)) == 1


def test_no_hook_stays_behind_after_an_exception(tiny_net):
    with pytest.raises(RuntimeError):
        masked_forward(tiny_net, random_masks(tiny_net), torch.rand(2, 5, 8, 8))
    assert not hooks_of(tiny_net)


def other_model(tiny_net, change):
    if change == "missing":
        return tiny_net[:6]
    tiny_net[6] = nn.Conv2d(6, 9, 3) if change == "other size" else nn.ReLU()
    return tiny_net


@pytest.mark.parametrize("change", ["missing", "other size", "not a layer"])
def test_masks_of_another_model_are_refused_by_the_site_that_differs(tiny_net, pictures, change):
    masks = MaskSet.for_model(tiny_net)
    model = other_model(tiny_net, change)
    with pytest.raises(MaskMismatchError, match="site '6' of 8 channels"):
        fold(model, masks)
    with pytest.raises(MaskMismatchError, match="site '6' of 8 channels"):
        masked_forward(model, masks, pictures)
    assert not hooks_of(model)


def test_a_model_without_convolutions_is_refused():
    with pytest.raises(MaskMismatchError, match="no Conv2d"):
        MaskSet.for_model(nn.Linear(3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_come_back_from_their_tensors(tiny_net, dtype):
    masks = random_masks(tiny_net.to(dtype))
    back = MaskSet.from_tensors(masks.tensors(), sharpness=20)
    assert back.sites == masks.sites
    for name in ("mask", "selection"):
        torch.testing.assert_close(getattr(back, name), getattr(masks, name), rtol=0, atol=0)


def test_masks_come_back_from_a_file_by_name(tmp_path):
    masks = MaskSet({"b.10": 2, "b.9": 3, "a": 1}, sharpness=5)
    masks.mask.data, masks.selection.data = torch.rand(6), torch.rand(6)
    save_file(masks.tensors(), tmp_path / "masks.safetensors")
    back = MaskSet.from_tensors(load_file(tmp_path / "masks.safetensors"), sharpness=5)
    for side in (False, True):
        wanted, got = masks.keeps(inverse=side), back.keeps(inverse=side)
        assert set(got) == set(wanted)
        assert all(torch.equal(got[site], wanted[site]) for site in wanted)


def test_tensors_are_named_by_site_and_detached_copies(tiny_net):
    masks = random_masks(tiny_net)
    tensors = masks.tensors()
    assert set(tensors) == {f"{s}.{v}" for s in ("0", "3", "6") for v in ("mask", "selection")}
    before = masks.mask.detach().clone()
    for tensor in tensors.values():
        assert not tensor.requires_grad
        tensor.zero_()
    assert torch.equal(masks.mask, before)


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({}, "nothing"),
        ({"a.mask": torch.ones(2)}, "a.selection"),
        ({"a.selection": torch.ones(2)}, "a.selection"),
        ({"a.mask": torch.ones(2), "a.selection": torch.ones(2), "b.other": torch.ones(2)}, "b.other"),
        ({"a.mask": torch.ones(2), "a.selection": torch.ones(3)}, "'a'"),
        ({"a.mask": torch.ones(2, 2), "a.selection": torch.ones(2, 2)}, "'a'"),
    ],
)
def test_tensors_that_are_no_masks_are_refused(tensors, name):
    with pytest.raises(MaskMismatchError, match=name):
        MaskSet.from_tensors(tensors, sharpness=20)
