import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bimask.errors import MaskMismatchError
from bimask.masking.batched_forward import PASS_SHARE, _fitting
from bimask.masking.frozen import FrozenNet
from bimask.masking.masks import MaskSet, masked_forward
from bimask.masking.sites import channels_of, kind_of
from bimask.nets import build_net

CHANNELS, SIZE, CLASSES = 5, 9, 4


# --- models, and how many of their batch norms can be folded away ---


class Net(nn.Module):
    """Modules by name, and a forward that says how they hang together."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.way = forward
        for name, module in modules.items():
            self.add_module(name, module)
        self.linear = nn.LazyLinear(CLASSES)

    def forward(self, x):
        return self.linear(self.way(self, x).relu().flatten(2).mean(2))


class Doubled(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(F.pad(x, (1, 1, 0, 0)))


class OtherNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).abs()


def branching(net, x):
    out = net.norm(net.conv(x))
    return out if out.mean() > 0 else -out


def counting(net, x):
    return net.norm(net.conv(x)) * (1 if len(x) < 3 else 2)


def conv(**options):
    return nn.Conv2d(CHANNELS, 6, 3, **options)


def built(name, width):
    return build_net(
        name,
        in_channels=CHANNELS,
        num_classes=CLASSES,
        width=width,
        mean=[0.4] * CHANNELS,
        std=[0.3] * CHANNELS,
    )


def plain(net, x):
    return net.norm(net.conv(x))


def hooked(where, model=None):
    model = model or Net(plain, conv=conv(), norm=nn.BatchNorm2d(6))
    model.get_submodule(where).register_forward_hook(lambda _module, _inputs, out: out + 0.5)
    return model


def tied():
    twice = nn.Conv2d(CHANNELS, CHANNELS, 3)
    return Net(lambda net, x: net.b(net.a(x).relu()), a=twice, b=twice)


MODELS = {
    "small resnet": (lambda: built("small_resnet", 5), 10),
    "preact resnet": (lambda: built("preactresnet18", 4), 8),
    "bias": (lambda: Net(plain, conv=conv(), norm=nn.BatchNorm2d(6)), 1),
    "no bias": (lambda: Net(plain, conv=conv(bias=False), norm=nn.BatchNorm2d(6)), 1),
    "no affine": (lambda: Net(plain, conv=conv(), norm=nn.BatchNorm2d(6, affine=False)), 1),
    "1x1": (lambda: Net(plain, conv=nn.Conv2d(CHANNELS, 6, 1), norm=nn.BatchNorm2d(6)), 1),
    "grouped, dilated, reflecting": (
        lambda: Net(
            lambda net, x: net.norm2(net.conv2(net.norm(net.conv(x)).relu())),
            conv=conv(stride=2),
            norm=nn.BatchNorm2d(6),
            conv2=nn.Conv2d(6, 8, 3, groups=2, dilation=2, padding=2, padding_mode="reflect"),
            norm2=nn.BatchNorm2d(8),
        ),
        2,
    ),
    "nested": (lambda: Net(lambda net, x: net.a(x), a=nn.Sequential(conv(), nn.BatchNorm2d(6))), 1),
    "two branches": (
        lambda: Net(
            lambda net, x: net.norm(net.conv(x)) + net.norm2(net.conv2(x)),
            conv=conv(),
            norm=nn.BatchNorm2d(6),
            conv2=conv(),
            norm2=nn.BatchNorm2d(6),
        ),
        2,
    ),
    "convolution read twice": (
        lambda: Net(
            lambda net, x: net.norm(out := net.conv(x)) + out, conv=conv(), norm=nn.BatchNorm2d(6)
        ),
        0,
    ),
    "convolution used twice": (
        lambda: Net(
            lambda net, x: net.norm(net.conv(net.conv(x).relu())),
            conv=nn.Conv2d(CHANNELS, CHANNELS, 3),
            norm=nn.BatchNorm2d(CHANNELS),
        ),
        0,
    ),
    "norm used twice": (
        lambda: Net(
            lambda net, x: net.norm(net.conv(x)) + net.norm(net.conv2(x)),
            conv=conv(),
            conv2=conv(),
            norm=nn.BatchNorm2d(6),
        ),
        0,
    ),
    "norm after an activation": (
        lambda: Net(lambda net, x: net.norm(net.conv(x).relu()), conv=conv(), norm=nn.BatchNorm2d(6)),
        0,
    ),
    "norm before the convolution": (
        lambda: Net(lambda net, x: net.conv(net.norm(x)), conv=conv(), norm=nn.BatchNorm2d(CHANNELS)),
        0,
    ),
    "norm after a transposed convolution": (
        lambda: Net(
            lambda net, x: net.norm(net.up(net.conv(x))),
            conv=conv(),
            up=nn.ConvTranspose2d(6, 7, 3),
            norm=nn.BatchNorm2d(7),
        ),
        0,
    ),
    "norm of another class": (lambda: Net(plain, conv=conv(), norm=OtherNorm(6)), 0),
    "convolution of another class": (
        lambda: Net(plain, conv=Doubled(CHANNELS, 6, 3), norm=nn.BatchNorm2d(6)),
        0,
    ),
    "branch on values": (lambda: Net(branching, conv=conv(), norm=nn.BatchNorm2d(6)), 0),
    "branch on the number of images": (
        lambda: Net(counting, conv=conv(), norm=nn.BatchNorm2d(6)),
        0,
    ),
    "hook on the convolution": (lambda: hooked("conv"), 0),
    "hook on the norm": (lambda: hooked("norm"), 0),
    "hook on the model": (lambda: hooked(""), 1),
    "hook on a model without norms": (
        lambda: hooked("", Net(lambda net, x: net.conv(x), conv=conv())),
        0,
    ),
}
UNUSUAL = {
    "convolution asked for its weight": lambda: Net(
        lambda net, x: net.norm(net.conv(x)) + net.conv.weight.mean(),
        conv=conv(),
        norm=nn.BatchNorm2d(6),
    ),
    "convolution asked for its size": lambda: Net(
        lambda net, x: net.norm(net.conv(x)) * net.conv.in_channels,
        conv=conv(),
        norm=nn.BatchNorm2d(6),
    ),
    "convolution called by keyword": lambda: Net(
        lambda net, x: net.norm(net.conv(input=x)),
        conv=conv(),
        norm=nn.BatchNorm2d(6),
    ),
    "convolution under two names": tied,
}
EACH_MODEL = pytest.mark.parametrize("name", MODELS)
BLOCK_SIZES = pytest.mark.parametrize("n", [1, 3, 7, 16])


def prepared(build, dtype=torch.float64):
    """The model, in eval mode, with batch norms that have a history."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
        model(torch.rand(2, CHANNELS, SIZE, SIZE))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 1)
                if module.affine:
                    nn.init.uniform_(module.weight, 0.5, 2)
                    nn.init.normal_(module.bias)
    return model.to(dtype)


def pictures_of(n, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, CHANNELS, SIZE, SIZE, generator=generator).to(dtype)


def factors_of(model, blocks, seed=2):
    """Factors of every block and channel, in [0, 1]."""
    sites = MaskSet.for_model(model)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(blocks, len(sites.mask), generator=generator).to(sites.mask)


def masks_of(model, factors):
    """Masks that keep each channel by just this factor: a = 0 leaves s alone."""
    masks = MaskSet.for_model(model, sharpness=1e4, mask=0.0)
    masks.selection = nn.Parameter(factors.clone())
    assert torch.equal(masks.keep(), factors)
    return masks


def frozen(model, images, **options):
    return FrozenNet(model, MaskSet.for_model(model), sample=images, **options)


def kept(masks, row):
    """The factors of masks at 0 with these selections."""
    with torch.no_grad():
        masks.selection.copy_(row), masks.mask.zero_()
    return masks.keeps()


def close(got, wanted, tolerance):
    scale = wanted.abs().max().clamp_min(1).item()
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * scale)


def answers_are_right(model, tolerance, blocks=3, n=4, **options):
    """Compare with the model itself, and with `masked_forward` block by block; hand back the net."""
    images = pictures_of(blocks * n, next(model.parameters()).dtype)
    factors = factors_of(model, blocks)
    net = frozen(model, images, **options)
    with torch.no_grad():
        close(net(images), model(images), tolerance)
        wanted = [
            masked_forward(model, masks_of(model, row), block)
            for row, block in zip(factors, images.split(n), strict=True)
        ]
        close(net(images, factors), torch.cat(wanted), tolerance)
        assert not torch.equal(net(images, factors), net(images))
    return net


# --- the same answers ---


@pytest.mark.parametrize("channels_last", [True, False])
@EACH_MODEL
def test_answers_are_those_of_the_model_and_of_its_masks(name, channels_last):
    build, folded = MODELS[name]
    net = answers_are_right(prepared(build), 1e-10, channels_last=channels_last)
    assert net.folded == folded


@pytest.mark.parametrize("name", [name for name in MODELS if name != "branch on values"])
def test_a_norm_that_is_masked_itself_is_folded_all_the_same(name):
    build, folded = MODELS[name]
    model, blocks, n = prepared(build), 3, 4
    named = {key: channels_of(m) for key, m in model.named_modules() if kind_of(m) in ("conv", "norm")}
    masks = MaskSet(named).double()
    rows = torch.rand(blocks, len(masks.mask), generator=torch.Generator().manual_seed(2)).double()
    images = pictures_of(blocks * n)
    net = FrozenNet(model, masks, sample=images)
    assert net.folded == folded
    with torch.no_grad():
        wanted, factors = [], []
        for row, block in zip(rows, images.split(n), strict=True):
            factors.append(torch.cat([*kept(masks, row).values()]))
            wanted.append(masked_forward(model, masks, block))
        close(net(images), model(images), 1e-10)
        close(net(images, torch.stack(factors)), torch.cat(wanted), 1e-10)


@EACH_MODEL
def test_nothing_is_folded_where_that_is_not_wanted(name):
    build, _ = MODELS[name]
    net = answers_are_right(prepared(build), 1e-10, fold_batch_norm=False)
    assert net.folded == 0


@pytest.mark.parametrize("name", UNUSUAL)
def test_a_model_may_look_at_its_convolutions_in_any_way(name):
    for folds in (True, False):
        answers_are_right(prepared(UNUSUAL[name]), 1e-10, fold_batch_norm=folds)


@pytest.mark.parametrize("name", ["small resnet", "preact resnet", "grouped, dilated, reflecting"])
def test_lower_precision_rounds_and_no_more(name):
    model = prepared(MODELS[name][0], torch.float32)
    answers_are_right(model, 1e-4)
    answers_are_right(model, 0.1, dtype=torch.bfloat16)


def test_logits_are_of_the_precision_of_the_images():
    model = prepared(MODELS["bias"][0], torch.float32)
    images = pictures_of(4, torch.float32)
    net = frozen(model, images, dtype=torch.bfloat16)
    assert net.dtype == torch.bfloat16
    assert {value.dtype for value in net.state_dict().values() if value.is_floating_point()} == {
        torch.bfloat16
    }
    assert net(images).dtype == net(images, factors_of(model, 2)).dtype == torch.float32
    assert frozen(model, images).dtype == torch.float32


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("name", ["small resnet", "preact resnet", "branch on values", "1x1"])
def test_gradients_are_those_of_the_masks(name, folds):
    model, blocks, n = prepared(MODELS[name][0]), 3, 4
    images = pictures_of(blocks * n).requires_grad_()
    factors = factors_of(model, blocks).requires_grad_()
    net = frozen(model, images.detach(), fold_batch_norm=folds)
    weights = torch.randn(blocks * n, CLASSES, generator=torch.Generator().manual_seed(3)).double()
    got = torch.autograd.grad((net(images, factors) * weights).sum(), (images, factors))
    for number in range(blocks):
        rows = slice(number * n, (number + 1) * n)
        masks = masks_of(model, factors[number].detach())
        block = images[rows].detach().requires_grad_()
        loss = (masked_forward(model, masks, block) * weights[rows]).sum()
        by_images, by_factors = torch.autograd.grad(loss, (block, masks.selection))
        close(got[0][rows], by_images, 1e-10)
        close(got[1][number], by_factors, 1e-10)
        assert by_factors.abs().max() > 1e-3


# --- blocks know nothing of each other ---


@BLOCK_SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["small resnet", "preact resnet", "grouped, dilated, reflecting"])
def test_a_block_has_the_bits_of_a_pass_alone(name, dtype, n):
    check_bits(prepared(MODELS[name][0], torch.float32), n, dtype=dtype)


@pytest.mark.parametrize("n", [7, 16])
def test_a_block_behind_a_narrow_convolution_has_the_bits_of_a_pass_alone(n):
    check_bits(prepared(MODELS["1x1"][0], torch.float32), n)


def check_bits(model, n, **options):
    images = pictures_of(5 * n, torch.float32).requires_grad_()
    factors = factors_of(model, 5).requires_grad_()
    weights = torch.randn(5 * n, CLASSES, generator=torch.Generator().manual_seed(3))
    net = frozen(model, images.detach(), **options)

    def numbers(rows, blocks):
        logits = net(images[rows], factors[blocks])
        by_all = torch.autograd.grad((logits * weights[rows]).sum(), (images, factors))
        return logits, by_all[0][rows], by_all[1][blocks]

    together = numbers(slice(None), slice(None))
    for number in range(5):
        rows, blocks = slice(number * n, (number + 1) * n), slice(number, number + 1)
        of_block = [t[blocks if len(t) == 5 else rows] for t in together]
        assert all(map(torch.equal, of_block, numbers(rows, blocks)))


# --- what stays as it was ---


@EACH_MODEL
def test_the_model_is_left_as_it_was(name):
    model = prepared(MODELS[name][0])
    model.train()
    before, images = copy.deepcopy(model.state_dict()), pictures_of(4)
    modules = dict(model.named_modules())
    net = frozen(model, images)
    net(images, factors_of(model, 2).requires_grad_()).sum().backward()
    assert dict(model.named_modules()) == modules
    assert all(module.training for module in modules.values())
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(value.requires_grad for value in net.parameters())


def test_nothing_of_a_pass_stays_behind_also_after_an_exception():
    model, images = prepared(MODELS["small resnet"][0]), pictures_of(4)
    net, factors = frozen(model, images), factors_of(model, 2)
    alone = net(images)
    masked = net(images, factors)
    assert torch.equal(net(images), alone)
    with pytest.raises(RuntimeError):
        net(images[:, :2], factors)
    assert torch.equal(net(images), alone)
    assert torch.equal(net(images, factors), masked)


def test_factors_of_one_are_the_model_itself():
    model, images = prepared(MODELS["small resnet"][0]), pictures_of(6)
    net = frozen(model, images)
    ones = torch.ones_like(factors_of(model, 3))
    close(net(images, ones), net(images), 1e-12)


# --- the rest ---


def test_the_largest_masked_activation_is_measured():
    model = prepared(MODELS["grouped, dilated, reflecting"][0])
    assert frozen(model, pictures_of(3)).activation == max(6 * 4 * 4, 8 * 4 * 4)
    assert frozen(prepared(MODELS["bias"][0]), pictures_of(3)).activation == 6 * 7 * 7


def test_what_a_pass_keeps_for_its_gradient_is_measured():
    """Of each image: itself, what the factors scale, what the ReLU leaves, what is pooled of it."""
    model = nn.Sequential(
        conv(padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)
    )
    low = torch.rand(3, CHANNELS, 20, 20)
    high = torch.rand(3, CHANNELS, 40, 40)
    net = frozen(model.eval(), low)
    wanted = 20**2 * (CHANNELS + 6 + 6) * 4
    assert net.bytes_kept(low) == pytest.approx(wanted, rel=0.1)
    assert net.bytes_kept(high) == pytest.approx(4 * net.bytes_kept(low), rel=0.1)
    assert _fitting(net, low, 100 * wanted) == pytest.approx(100 * PASS_SHARE, abs=5)


def test_masks_of_another_model_are_refused():
    model, other = prepared(MODELS["bias"][0]), prepared(MODELS["two branches"][0])
    with pytest.raises(MaskMismatchError, match="conv2"):
        FrozenNet(model, MaskSet.for_model(other), sample=pictures_of(2))


@pytest.mark.parametrize("folds", [True, False])
def test_shapes_are_right_on_a_device_without_numbers(monkeypatch, folds):
    monkeypatch.setattr(FrozenNet, "_answers", staticmethod(lambda *_: True))  # nothing to compare
    model = prepared(MODELS["small resnet"][0], torch.float32).to("meta")
    images = pictures_of(12, torch.float32).to("meta")
    net = frozen(model, images, fold_batch_norm=folds)
    factors = torch.ones(3, len(MaskSet.for_model(model).mask), device="meta", requires_grad=True)
    logits = net(images, factors)
    assert logits.shape == net(images).shape == (12, CLASSES)
    assert logits.device.type == "meta"
    (gradient,) = torch.autograd.grad(logits.sum(), factors)
    assert gradient.shape == factors.shape
    assert net.folded == (10 if folds else 0)


@pytest.mark.slow
def test_a_compiled_net_answers_the_same():
    model = prepared(MODELS["grouped, dilated, reflecting"][0])
    net = answers_are_right(model, 1e-10, compile=True)
    assert isinstance(net.net, torch._dynamo.OptimizedModule)  # not the fallback


def test_a_net_that_cannot_be_compiled_runs_as_it_is_and_says_so(monkeypatch):
    def broken(_net):
        def forward(_images):
            raise RuntimeError("no compiler found")

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="torch.compile failed .no compiler found.; the net runs as"):
        answers_are_right(prepared(MODELS["bias"][0]), 1e-10, compile=True)
