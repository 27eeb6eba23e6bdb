"""Every attack's pixels against closed forms or plain loops."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bimask.attacks import (
    ATTACKS,
    BPP,
    SIG,
    SSBA,
    AdaptiveBlend,
    BadNets,
    Blended,
    LabelConsistent,
    Role,
    WaNet,
)
from bimask.data import ImageData, load_data


def noise(n=4, channels=3, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, height, width, generator=generator)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def columns_of(attack):
    """What the trigger adds to a grey image, byte by byte, in its first row."""
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    return (attack.apply_bytes(grey).int() - 128)[0, 0, 0].tolist()


def badnets_pixels():
    images = (noise(seed=3) * 254).byte()
    triggered = BadNets().apply_bytes(images)
    changed = (triggered != images).any(0).any(0).nonzero()
    assert changed.tolist() == [[i, j] for i in (29, 30, 31) for j in (29, 30, 31)]
    assert (triggered[..., 29:, 29:] == 255).all()
    half = BadNets(size=1, value=0.5).apply(torch.zeros(1, 3, 4, 6))
    assert half.nonzero().tolist() == [[0, 0, 3, 5], [0, 1, 3, 5], [0, 2, 3, 5]]
    assert half.max() == 0.5


KEY_TOP_LEFT = [0.8469737, 0.2197064, 0.2136163]
KEY_BOTTOM_RIGHT = [0.4192137, 0.7850615, 0.8615829]


def blended_pixels():
    images = noise(2).double()
    key = Blended(alpha=1).apply(torch.zeros(1, 3, 32, 32).double())
    triggered = Blended(alpha=0.2).apply(images)
    torch.testing.assert_close(triggered, 0.8 * images + 0.2 * key, rtol=0, atol=1e-7)
    # the key is uniform noise, the same for ever
    torch.testing.assert_close(key[0, :, 0, 0].tolist(), KEY_TOP_LEFT, rtol=0, atol=1e-6)
    torch.testing.assert_close(key[0, :, 31, 31].tolist(), KEY_BOTTOM_RIGHT, rtol=0, atol=1e-6)
    shares = torch.histc(key, bins=4, min=0, max=1) / key.numel()
    assert (shares - 0.25).abs().max() < 0.03
    other = Blended(alpha=1, pattern_seed=1).apply(torch.zeros(1, 3, 32, 32))
    assert (other != key).float().mean() > 0.99


def sig_pixels():
    grey = torch.full((1, 3, 32, 32), 0.5, dtype=torch.float64)
    triggered = SIG().apply(grey)
    for j in range(32):
        wanted = 0.5 + 40 / 255 * math.sin(2 * math.pi * j * 6 / 32)
        torch.testing.assert_close(
            triggered[..., j], torch.full((1, 3, 32), wanted, dtype=torch.float64)
        )
    # 6 periods in 32 columns: three in 16, rounded to whole bytes
    three = [0, 37, 28, -15, -40, -15, 28, 37, 0, -37, -28, 15, 40, 15, -28, -37]
    assert columns_of(SIG()) == three * 2
    white = SIG().apply_bytes(torch.full((1, 1, 4, 32), 255, dtype=torch.uint8))
    assert white.max() == 255
    assert white.min() == 215


def wanet_of(displacement, **settings):
    attack = WaNet(grid_size=displacement.shape[-1], **settings)
    attack.load_state({"displacement": displacement})
    return attack


def moved_by(images, pixels):
    """Columns read `pixels` to the right, by hand: two neighbours, nothing beyond the last column."""
    width = images.shape[-1]
    wanted = torch.empty_like(images)
    for j in range(width):
        place = min(max(j + pixels, 0.0), width - 1.0)
        left = min(int(place), width - 2)
        part = place - left
        wanted[..., j] = (1 - part) * images[..., left] + part * images[..., left + 1]
    return wanted


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 32), (12, 20)])
@pytest.mark.parametrize("size", [1.0, -2.5])
def test_an_even_displacement_moves_all_columns_alike(height, width, size):
    images = noise(2, height=height, width=width).double()
    field = torch.zeros(2, 4, 4)
    field[0] = size
    triggered = wanet_of(field).apply(images)
    pixels = 0.5 * size / width * (width - 1) / 2  # s c / W in [-1, 1] units, which span W - 1 pixels
    torch.testing.assert_close(triggered, moved_by(images, pixels), rtol=0, atol=1e-6)
    tall = wanet_of(field.flip(0)).apply(images.transpose(2, 3)).transpose(2, 3)
    torch.testing.assert_close(tall, triggered, rtol=0, atol=1e-6)


def places_of(side):
    """An image whose value is its column, in pixels; warped, it tells where columns came from."""
    return torch.linspace(0, 1, side).double().expand(1, 1, side, side).clone()


def wanet_pixels():
    field = torch.zeros(2, 4, 4)
    field[0, :, 0], field[0, :, 3] = 1, -1
    images = noise(1).double()
    triggered = wanet_of(field, strength=2).apply(images)
    # at the ends the enlarged field is the field: pixel 0 is read at 0 + 31/32, pixel 31 at 31 - 31/32
    for place, near, far in ((0, 0, 1), (31, 31, 30)):
        wanted = images[..., near] / 32 + images[..., far] * 31 / 32
        torch.testing.assert_close(triggered[..., place], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [32, 64])
def test_the_published_warp_moves_a_fifth_of_a_pixel(ready, side):
    attack, places = ready("wanet", (1, side, side)), places_of(side)
    moved = (attack.apply(places) - places).abs().mean() * (side - 1)
    assert 0.1 < moved < 0.3


def test_cross_samples_are_warped_by_noise_of_their_own_besides(ready):
    side = 32
    attack, places = ready("wanet", (1, side, side)), places_of(side).expand(3, -1, -1, -1)
    crossed = attack.companions(places, places, generator=draws())
    apart = (crossed - attack.apply(places)) * (side - 1)
    assert not torch.equal(crossed[0], crossed[1])
    inner = apart[..., 2:-2]  # what is read beyond the border is clipped
    assert inner.abs().max() <= 31 / 64 + 1e-6
    assert inner.abs().mean().item() == pytest.approx(31 / 128, rel=0.1)
    assert abs(inner.mean()) < 0.02


def bpp_pixels():
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    got = BPP().apply_bytes(ramp).flatten().tolist()
    assert got == [round(round(b / 255 * 7) / 7 * 255) for b in range(256)]
    assert sorted(set(got)) == [0, 36, 73, 109, 146, 182, 219, 255]
    assert set(BPP(squeeze_num=2).apply_bytes(ramp).flatten().tolist()) == {0, 255}


def test_negatives_carry_the_residual_of_another_image():
    images = noise(5, 1, 4, 4)
    data = ImageData((images * 255).byte(), torch.arange(5) % 2, ("a", "b"))
    poisoned = BPP(negative_rate=0.8).poison(data, rate=0.2, seed=0)
    beside = poisoned.indices(Role.NEGATIVE)
    assert len(beside) == 4
    for j in beside.tolist():
        x = data.images[j].double() / 255
        wanted = []
        for r in range(5):
            other = data.images[r].double() / 255
            mixed = (x + (other * 7).round() / 7 - other).clamp(0, 1)
            wanted.append((mixed * 255).round().byte())
        fits = [r for r in range(5) if torch.equal(wanted[r], poisoned.data.images[j])]
        assert fits
        assert fits != [j]


@pytest.mark.parametrize("value", [0, 255])
def test_negatives_are_clipped_and_never_wrap(value):
    """Without clipping, -0.05 would be stored as 244 and 1.1 as 24."""
    images = torch.full((40, 1, 8, 8), value, dtype=torch.uint8)
    images[1::2] = torch.randint(0, 256, (20, 1, 8, 8), generator=draws(), dtype=torch.uint8)
    data = ImageData(images, torch.arange(40) % 4, tuple("abcd"))
    poisoned = BPP(negative_rate=0.9).poison(data, rate=0.1, seed=0)
    even = poisoned.indices(Role.NEGATIVE)
    change = poisoned.data.images[even].int() - images[even].int()
    assert change.abs().max() <= 19  # half a step of 36.4, and rounding


def constant_generators(attack, pattern, mask):
    """The same attack, its generators saying these numbers everywhere, before any tanh."""
    state = attack.state()
    for part, value in (("pattern", pattern), ("mask", mask)):
        norm = f"{part}.up.2.4"  # the last layer
        state[f"{norm}.weight"] = torch.zeros_like(state[f"{norm}.weight"])
        state[f"{norm}.bias"] = torch.full_like(state[f"{norm}.bias"], value)
    attack.load_state(state)
    return attack


def input_aware_pixels(ready):
    images = noise(2, 3, 16, 16)
    attack = ready("input_aware", (3, 16, 16))
    white = constant_generators(attack, 20.0, 20.0).apply(images)
    assert torch.equal(white, torch.ones_like(images))  # patterns reach 1: no second tanh before
    black = constant_generators(attack, -20.0, 20.0).apply(images)
    torch.testing.assert_close(black, torch.zeros_like(images), rtol=0, atol=1e-7)
    off = constant_generators(attack, 20.0, -20.0).apply(images)
    torch.testing.assert_close(off, images, rtol=0, atol=1e-7)
    mixed = constant_generators(attack, 0.3, 0.1).apply(images)
    pattern = math.tanh(0.3) / 2 + 0.5
    mask = math.tanh(20 * (math.tanh(0.1) / 2 + 0.5) - 10) / 2 + 0.5
    torch.testing.assert_close(mixed, images + (pattern - images) * mask, rtol=0, atol=1e-6)


def test_input_aware_cross_samples_carry_what_another_image_gets(ready):
    attack, images = ready("input_aware", (3, 16, 16)), 0.2 + 0.6 * noise(4, 3, 16, 16)
    others = images.flip(0)
    crossed = attack.companions(images, others, generator=draws())
    # where pattern and mask are the other's, x' - x = (p - x) m: two pictures of one owner give m
    twice = attack.companions(images / 2, others, generator=draws())
    kept = (crossed - twice) / (images / 2)  # 1 - m
    alone = attack.apply(others) - attack.companions(others / 2, others, generator=draws())
    torch.testing.assert_close(kept, alone / (others / 2), rtol=0, atol=1e-3)
    assert (crossed - attack.apply(images)).abs().max() > 1e-4  # untrained, they are much alike


def low_frequency_pixels(ready):
    attack = ready("low_frequency", (3, 24, 32))
    pattern = attack.state()["pattern"]
    assert pattern.min() == 0
    assert pattern.max().item() == pytest.approx(0.2, abs=1e-7)
    images = noise(2, 3, 24, 32)
    assert torch.equal(attack.apply(images), (images + pattern).clamp(0, 1))
    # by hand: the cosine transform of each channel vanishes beyond the fourth wave of an axis
    picture = pattern[0].double().numpy()
    for u in range(24):
        for v in range(32):
            rows = np.cos(math.pi * (np.arange(24) + 0.5) * u / 24)
            columns = np.cos(math.pi * (np.arange(32) + 0.5) * v / 32)
            if u >= 4 or v >= 4:
                assert abs(rows @ picture @ columns) < 1e-4


def test_the_low_frequency_pattern_is_found_against_the_net(ready, fit_linear):
    train = load_data("digits").train
    net = fit_linear(train)
    before, after = (ready("low_frequency", (1, 16, 16), target=3) for _ in range(2))
    before.steps, after.steps = 0, 40
    losses = []
    for attack in (before, after):
        attack.prepare(train, seed=0, fit_net=fit_linear)
        logits = net(attack.apply(train.floats()))
        losses.append(F.cross_entropy(logits, torch.full((len(train),), 3)).item())
    assert losses[1] < losses[0] - 0.01


def ssba_pixels(ready):
    attack, images = ready("ssba"), 0.4 + 0.2 * noise(3)
    residual = (attack.apply(images) - images) / 0.05
    rms = residual.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(rms, torch.ones(3), rtol=0, atol=1e-4)
    assert (residual[0] - residual[1]).abs().max() > 1e-3  # each image its own


def test_the_decoder_reads_what_the_encoder_wrote(fit_linear):
    splits = load_data("digits", image_size=8)
    attack = SSBA(bits=8, steps=150, strength=0.1)
    attack.prepare(splits.train, seed=0)
    images = splits.test.floats()
    secret = attack.state()["secret"]
    assert (attack.read(attack.apply(images)) == secret).float().mean() > 0.95
    assert 0.2 < (attack.read(images) == secret).float().mean() < 0.8


def adaptive_blend_pixels():
    images = noise(6, 1, 16, 16).double()
    attack = AdaptiveBlend()
    key = Blended(alpha=1).apply(torch.zeros(1, 1, 16, 16).double())
    torch.testing.assert_close(attack.apply(images), 0.8 * images + 0.2 * key, rtol=0, atol=1e-7)
    trained = attack.poisoned(images, generator=draws())
    shown = []
    for image, got in zip(images, trained, strict=True):
        tiles = []
        for row in range(0, 16, 4):
            for column in range(0, 16, 4):
                place = (0, slice(row, row + 4), slice(column, column + 4))
                blended = 0.85 * image[place] + 0.15 * key[0][place]
                tiles.append(torch.allclose(got[place], blended, atol=1e-7))
                assert tiles[-1] or torch.equal(got[place], image[place])
        assert sum(tiles) == 8
        shown.append(tuple(tiles))
    assert len(set(shown)) == 6


def label_consistent_pixels():
    grey = torch.full((1, 2, 7, 9), 0.5)
    got = LabelConsistent().apply(grey)
    checker = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    for rows in (slice(0, 3), slice(4, 7)):
        for columns in (slice(0, 3), slice(6, 9)):
            assert torch.equal(got[0, 0, rows, columns], checker)
            assert torch.equal(got[0, 1, rows, columns], checker)
    assert (got == 0.5).sum() == 2 * (7 * 9 - 4 * 9)
    faint = LabelConsistent(size=2, amplitude=0.1).apply(grey)[0, 0]
    assert faint[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == pytest.approx([0.6] * 4)
    assert faint[[0, 1, -1, -2], [1, 0, -2, -1]].tolist() == pytest.approx([0.4] * 4)


def test_training_images_are_made_hard_for_the_net_within_the_budget(ready, fit_linear):
    splits = load_data("digits")
    attack = LabelConsistent(target=3, steps=5)
    attack.prepare(splits.train, seed=0, fit_net=fit_linear)
    images = splits.train.floats(splits.train.labels == 3)
    hard = attack.made_hard(images, generator=draws())
    assert (hard - images).abs().max() <= 16 / 255 + 1e-6
    assert hard.min() >= 0
    assert hard.max() <= 1
    labels, net = torch.full((len(images),), 3), fit_linear(splits.train)
    each = [F.cross_entropy(net(x), labels, reduction="none") for x in (images, hard)]
    assert (each[1] > each[0]).all()
    trained = attack.poisoned(images, generator=draws()).clamp(0, 1)
    assert torch.equal(trained, attack.apply(hard))


GOLDEN = {
    "adaptive_blend": adaptive_blend_pixels,
    "badnets": badnets_pixels,
    "blended": blended_pixels,
    "bpp": bpp_pixels,
    "input_aware": input_aware_pixels,
    "label_consistent": label_consistent_pixels,
    "low_frequency": low_frequency_pixels,
    "sig": sig_pixels,
    "ssba": ssba_pixels,
    "wanet": wanet_pixels,
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_exact_pixels(name, ready):
    check = GOLDEN[name]
    check(ready) if inspect.signature(check).parameters else check()


def test_every_attack_has_exact_pixels():
    assert set(GOLDEN) == set(ATTACKS)
    assert len({attack.__name__ for attack in ATTACKS.values()}) == len(ATTACKS)
