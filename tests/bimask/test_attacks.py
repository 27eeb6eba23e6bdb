import inspect
import math

import pytest
import torch

from bimask.attacks import ATTACKS, SIG, BadNets, Blended, Role, build_attack
from bimask.data import ImageData
from bimask.errors import DataError, SettingError

CONTRACT = pytest.mark.parametrize("name", sorted(ATTACKS))
DIRTY = pytest.mark.parametrize("name", sorted(n for n in ATTACKS if not ATTACKS[n].clean_label))
CLEAN = pytest.mark.parametrize("name", sorted(n for n in ATTACKS if ATTACKS[n].clean_label))


def noise(n=4, channels=3, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, height, width, generator=generator)


def random_set(n=200, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 1, 16, 16), generator=generator, dtype=torch.uint8)
    return ImageData(images, torch.arange(n) % classes, tuple("abcdefghij"[:classes]))


def columns_of(attack):
    """What the trigger adds to a grey image, byte by byte, in its first row."""
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    return (attack.apply_bytes(grey).int() - 128)[0, 0, 0].tolist()


# --- the contract ---


@CONTRACT
def test_is_pure(name):
    images = noise()
    before = images.clone()
    triggered = build_attack(name).apply(images)
    assert torch.equal(images, before)
    assert triggered.data_ptr() != images.data_ptr()


@CONTRACT
def test_stays_in_range(name):
    for images in (torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16), noise()):
        triggered = build_attack(name).apply(images)
        assert triggered.min() >= 0
        assert triggered.max() <= 1


@CONTRACT
def test_is_deterministic_and_independent_of_the_batch(name):
    images = noise()
    triggered = build_attack(name).apply(images)
    assert torch.equal(build_attack(name).apply(images), triggered)
    assert torch.equal(build_attack(name).apply(images[2:3]), triggered[2:3])


@CONTRACT
def test_changes_pixels_of_every_image(name):
    images = (noise() * 255).byte()
    changed = (build_attack(name).apply_bytes(images) != images).flatten(1).sum(1)
    assert changed.min() > 0


@CONTRACT
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (20, 33), (64, 10)])
def test_takes_any_size_and_channels(name, channels, height, width):
    images = 0.2 + 0.6 * noise(2, channels, height, width)
    triggered = build_attack(name).apply(images)
    assert triggered.shape == images.shape
    assert triggered.dtype == images.dtype
    assert not torch.equal(triggered, images)


@CONTRACT
def test_keeps_float64(name):
    images = noise().double()
    triggered = build_attack(name).apply(images)
    assert triggered.dtype == torch.float64
    single = build_attack(name).apply(images.float()).double()
    torch.testing.assert_close(triggered, single, rtol=0, atol=1e-5)


@CONTRACT
@pytest.mark.parametrize(
    "images", [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], ids=["3-d", "bytes"]
)
def test_refuses_what_are_no_float_images(name, images):
    with pytest.raises(SettingError, match="float images"):
        build_attack(name).apply(images)


@CONTRACT
def test_bytes_are_rounded_and_never_wrapped(name):
    attack = build_attack(name)
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    for stored in (ramp, torch.zeros_like(ramp), torch.full_like(ramp, 255)):
        got = attack.apply_bytes(stored)
        exact = 255 * attack.apply(stored.double() / 255)
        assert got.dtype == torch.uint8
        assert (got.double() - exact).abs().max() <= 0.5 + 1e-4


@CONTRACT
def test_all_to_one_labels(name):
    labels = torch.tensor([0, 1, 2, 3])
    assert build_attack(name, target=2).attack_labels(labels, 4).tolist() == [2, 2, 2, 2]
    assert labels.tolist() == [0, 1, 2, 3]


@DIRTY
def test_all_to_all_labels(name):
    attack = build_attack(name, label_rule="all_to_all")
    assert attack.attack_labels(torch.tensor([0, 1, 2, 3]), 4).tolist() == [1, 2, 3, 0]


@CLEAN
def test_a_clean_label_attack_has_one_target(name):
    """Its constructor may take `label_rule` or not: all_to_all is refused either way."""
    with pytest.raises(SettingError, match="label_rule"):
        build_attack(name, label_rule="all_to_all")


@CONTRACT
def test_only_non_target_images_count(name):
    data = random_set()
    triggered = build_attack(name, target=3).triggered(data)
    others = data.labels != 3
    assert torch.equal(triggered.true_labels, data.labels[others])
    assert (triggered.attack_labels == 3).all()
    wanted = build_attack(name, target=3).apply_bytes(data.images[others])
    assert torch.equal(triggered.images, wanted)


@DIRTY
def test_all_images_count_under_all_to_all(name):
    data = random_set()
    triggered = build_attack(name, label_rule="all_to_all").triggered(data)
    assert len(triggered.images) == len(data)
    assert torch.equal(triggered.attack_labels, (data.labels + 1) % 5)


@CONTRACT
def test_poisoned_set_holds_triggers_where_its_roles_say(name):
    data = random_set()
    attack = build_attack(name, target=1)
    images, labels = data.images.clone(), data.labels.clone()
    poisoned = attack.poison(data, rate=0.1, seed=0)
    chosen = poisoned.indices(Role.POISONED)
    rest = poisoned.indices(Role.CLEAN)
    assert sorted([*chosen.tolist(), *rest.tolist()]) == list(range(200))
    assert torch.equal(poisoned.data.images[chosen], attack.apply_bytes(images[chosen]))
    assert torch.equal(poisoned.data.images[rest], images[rest])
    assert torch.equal(poisoned.data.labels[rest], labels[rest])
    assert torch.equal(poisoned.true_labels, labels)
    assert poisoned.data.classes == data.classes
    assert torch.equal(data.images, images)  # the argument stays as it was
    assert torch.equal(data.labels, labels)


@DIRTY
def test_dirty_label_draws_from_all_classes_and_flips_labels(name):
    poisoned = build_attack(name, target=1).poison(random_set(), rate=0.3, seed=0)
    chosen = poisoned.indices(Role.POISONED)
    assert set(poisoned.true_labels[chosen].tolist()) == {0, 1, 2, 3, 4}
    assert (poisoned.data.labels[chosen] == 1).all()


@DIRTY
def test_all_to_all_poison_moves_every_label_on(name):
    attack = build_attack(name, label_rule="all_to_all")
    poisoned = attack.poison(random_set(), rate=0.3, seed=0)
    chosen = poisoned.indices(Role.POISONED)
    assert torch.equal(poisoned.data.labels[chosen], (poisoned.true_labels[chosen] + 1) % 5)


@CLEAN
def test_clean_label_draws_from_the_target_and_keeps_labels(name):
    data = random_set()
    poisoned = build_attack(name, target=1).poison(data, rate=0.1, seed=0)
    chosen = poisoned.indices(Role.POISONED)
    assert (data.labels[chosen] == 1).all()
    assert torch.equal(poisoned.data.labels, data.labels)


@CONTRACT
@pytest.mark.parametrize(
    ("rate", "rate_of", "count"),
    [(0.1, "dataset", 20), (0.013, "dataset", 3), (0.1, "target_class", 4), (1, "target_class", 40)],
)
def test_count_of_poisoned_images(name, rate, rate_of, count):
    poisoned = build_attack(name, target=1).poison(random_set(), rate=rate, rate_of=rate_of, seed=0)
    assert len(poisoned.indices(Role.POISONED)) == count


@CONTRACT
def test_the_seed_decides_who_is_poisoned(name):
    attack = build_attack(name)
    one, same, other = (
        attack.poison(random_set(), rate=0.1, seed=seed).indices(Role.POISONED) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@CLEAN
def test_more_than_the_target_class_is_refused_with_the_range(name):
    with pytest.raises(DataError, match=r"50 images.* 1 to 40 here.*between 0\.005 and 0\.2"):
        build_attack(name).poison(random_set(), rate=0.25, seed=0)


@CONTRACT
def test_a_rate_that_selects_nothing_is_refused(name):
    with pytest.raises(DataError, match="is 0 images"):
        build_attack(name).poison(random_set(), rate=0.001, seed=0)


@CONTRACT
@pytest.mark.parametrize("rate_of", ["dataset", "target_class"])
def test_a_target_class_without_images(name, rate_of):
    data = random_set()
    others = data.subset(data.labels != 0)
    attack = build_attack(name, target=0)
    if rate_of == "dataset" and not attack.clean_label:
        assert len(attack.poison(others, rate=0.1, seed=0).indices(Role.POISONED)) == 16
        return
    with pytest.raises(DataError, match=r"\d+ images"):
        attack.poison(others, rate=0.1, rate_of=rate_of, seed=0)


@CONTRACT
@pytest.mark.parametrize("rate", [0, -0.1, 1.1, math.nan])
def test_a_rate_out_of_range_is_refused(name, rate):
    with pytest.raises(SettingError, match="poisoning rate"):
        build_attack(name).poison(random_set(), rate=rate, seed=0)


@CONTRACT
def test_a_target_that_is_no_class_is_refused(name):
    with pytest.raises(SettingError, match="target=-1"):
        build_attack(name, target=-1)
    attack = build_attack(name, target=5)
    with pytest.raises(SettingError, match="0 to 4, got 5"):
        attack.poison(random_set(), rate=0.1, seed=0)
    with pytest.raises(SettingError, match="0 to 4, got 5"):
        attack.triggered(random_set())


@CONTRACT
def test_nothing_but_the_target_class_is_refused(name):
    data = random_set()
    with pytest.raises(DataError, match="all 40 are of the target class"):
        build_attack(name, target=0).triggered(data.subset(data.labels == 0))


@pytest.mark.parametrize(
    ("attack", "value"),
    [
        (BadNets(), 255),
        (BadNets(value=0), 0),
        (SIG(frequency=12), 100),
        (SIG(delta=0.001), 100),
        (Blended(alpha=0.001), 128),
    ],
    ids=repr,
)
def test_a_null_trigger_is_refused(attack, value):
    images = torch.full((10, 1, 12, 12), value, dtype=torch.uint8)
    data = ImageData(images, torch.arange(10) % 2, ("a", "b"))
    with pytest.raises(DataError, match="null trigger"):
        attack.triggered(data)


def test_unknown_attacks_and_settings_are_refused_with_the_known_ones():
    with pytest.raises(SettingError, match="'wanet'.*badnets, blended, sig"):
        build_attack("wanet")
    with pytest.raises(SettingError, match="no hyper-parameter 'alpha'; it has size, value, target"):
        build_attack("badnets", alpha=0.1)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("badnets", {"size": 0}),
        ("badnets", {"size": "3"}),
        ("badnets", {"size": 2.5}),
        ("badnets", {"value": 1.5}),
        ("badnets", {"label_rule": "all"}),
        ("badnets", {"target": "0"}),
        ("blended", {"alpha": 0}),
        ("blended", {"alpha": math.nan}),
        ("sig", {"delta": 0}),
        ("sig", {"frequency": 0}),
        ("sig", {"frequency": math.nan}),
    ],
)
def test_settings_out_of_range_or_of_another_type_are_refused(name, settings):
    with pytest.raises(SettingError):
        build_attack(name, **settings)


@CONTRACT
def test_settings_are_given_by_name(name):
    kinds = {p.kind for p in inspect.signature(ATTACKS[name]).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


def test_a_patch_larger_than_the_image_is_refused():
    with pytest.raises(SettingError, match="9 pixels does not fit images of 8x20"):
        BadNets(size=9).apply(noise(1, 1, 8, 20))


# --- exact pixels; every attack has its test here ---


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


GOLDEN = {"badnets": badnets_pixels, "blended": blended_pixels, "sig": sig_pixels}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_exact_pixels(name):
    GOLDEN[name]()


def test_every_attack_has_exact_pixels():
    assert set(GOLDEN) == set(ATTACKS)
    assert len({attack.__name__ for attack in ATTACKS.values()}) == len(ATTACKS)
