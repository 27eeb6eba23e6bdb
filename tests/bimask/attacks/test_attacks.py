import inspect
import math

import pytest
import torch

from bimask.attacks import (
    ATTACKS,
    BPP,
    SIG,
    AdaptiveBlend,
    Attack,
    BadNets,
    Blended,
    LabelConsistent,
    Role,
    build_attack,
)
from bimask.data import ImageData
from bimask.errors import DataError, SettingError

CONTRACT = pytest.mark.parametrize("name", sorted(ATTACKS))
SHAPE = (1, 16, 16)  # of random_set
DIRTY = pytest.mark.parametrize("name", sorted(n for n in ATTACKS if not ATTACKS[n].clean_label))
CLEAN = pytest.mark.parametrize("name", sorted(n for n in ATTACKS if ATTACKS[n].clean_label))


def noise(n=4, channels=3, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, height, width, generator=generator)


def random_set(n=200, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 1, 16, 16), generator=generator, dtype=torch.uint8)
    return ImageData(images, torch.arange(n) % classes, tuple("abcdefghij"[:classes]))


def learn_on(attack, data, steps=10):
    """What a training does to an attack that learns with the victim, without a victim.

    Before its first steps, Input-aware's pattern is the same for all images but for its rounding.
    """
    for step in range(steps if attack.batchwise else 0):
        generator = torch.Generator().manual_seed(step)
        batch = attack.poison_batch(
            data.floats(slice(0, 40)),
            data.labels[:40],
            data.num_classes,
            share=0.5,
            generator=generator,
        )
        if batch.penalty is not None:
            batch.penalty.backward()
        attack.step()


# --- the contract ---


@CONTRACT
def test_is_pure(name, ready):
    images = noise()
    before = images.clone()
    triggered = ready(name).apply(images)
    assert torch.equal(images, before)
    assert triggered.data_ptr() != images.data_ptr()


@CONTRACT
def test_stays_in_range(name, ready):
    for images in (torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16), noise()):
        triggered = ready(name, images.shape[1:]).apply(images)
        assert triggered.min() >= 0
        assert triggered.max() <= 1


@CONTRACT
def test_is_deterministic_and_independent_of_the_batch(name, ready):
    images = noise()
    triggered = ready(name).apply(images)
    assert torch.equal(ready(name).apply(images), triggered)
    alone = ready(name).apply(images[2:3])  # convolutions round otherwise in another batch
    torch.testing.assert_close(alone, triggered[2:3], rtol=0, atol=1e-6)


@CONTRACT
def test_changes_pixels_of_every_image(name, ready):
    images = (noise() * 255).byte()
    changed = (ready(name).apply_bytes(images) != images).flatten(1).sum(1)
    assert changed.min() > 0


@CONTRACT
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (32, 32), (20, 33), (64, 10)])
def test_takes_any_size_and_channels(name, channels, height, width, ready):
    images = 0.2 + 0.6 * noise(2, channels, height, width)
    triggered = ready(name, images.shape[1:]).apply(images)
    assert triggered.shape == images.shape
    assert triggered.dtype == images.dtype
    assert not torch.equal(triggered, images)


@CONTRACT
def test_keeps_float64(name, ready):
    images = noise().double()
    triggered = ready(name).apply(images)
    assert triggered.dtype == torch.float64
    single = ready(name).apply(images.float()).double()
    torch.testing.assert_close(triggered, single, rtol=0, atol=1e-5)


@CONTRACT
@pytest.mark.parametrize(
    "images", [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], ids=["3-d", "bytes"]
)
def test_refuses_what_are_no_float_images(name, images):
    with pytest.raises(SettingError, match="float images"):
        build_attack(name).apply(images)


@CONTRACT
def test_bytes_are_rounded_and_never_wrapped(name, ready):
    attack = ready(name, (3, 16, 16))
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
def test_only_non_target_images_count(name, ready):
    data = random_set()
    triggered = ready(name, SHAPE, target=3).triggered(data)
    others = data.labels != 3
    assert torch.equal(triggered.true_labels, data.labels[others])
    assert (triggered.attack_labels == 3).all()
    wanted = ready(name, SHAPE, target=3).apply_bytes(data.images[others])
    assert torch.equal(triggered.images, wanted)


@DIRTY
def test_all_images_count_under_all_to_all(name, ready):
    data = random_set()
    triggered = ready(name, SHAPE, label_rule="all_to_all").triggered(data)
    assert len(triggered.images) == len(data)
    assert torch.equal(triggered.attack_labels, (data.labels + 1) % 5)


@CONTRACT
def test_poisoned_set_holds_triggers_where_its_roles_say(name, ready):
    data = random_set()
    attack = ready(name, SHAPE, target=1)
    images, labels = data.images.clone(), data.labels.clone()
    poisoned = attack.poison(data, rate=0.1, seed=0)
    chosen = poisoned.indices(Role.POISONED)
    rest = poisoned.roles != Role.POISONED
    if type(attack).poisoned is Attack.poisoned:
        assert torch.equal(poisoned.data.images[chosen], attack.apply_bytes(images[chosen]))
    changed = (poisoned.data.images != images).flatten(1).any(1)
    assert changed[chosen].all()
    assert not changed[poisoned.indices(Role.CLEAN)].any()
    assert torch.equal(poisoned.data.labels[rest], labels[rest])
    assert torch.equal(poisoned.true_labels, labels)
    assert poisoned.data.classes == data.classes
    assert torch.equal(data.images, images)  # the argument stays as it was
    assert torch.equal(data.labels, labels)


@CONTRACT
def test_companions_are_changed_keep_their_label_and_have_a_code_of_their_own(name, ready):
    data, attack = random_set(), ready(name, SHAPE, target=1)
    learn_on(attack, data)
    poisoned = attack.poison(data, rate=0.1, seed=0)
    roles = set(poisoned.roles.tolist())
    if attack.companion is None:
        assert attack.companions_wanted(20, 200) == 0
        assert roles == {Role.CLEAN, Role.POISONED}
        return
    assert roles == {Role.CLEAN, Role.POISONED, attack.companion}
    beside = poisoned.indices(attack.companion)
    assert len(beside) == attack.companions_wanted(20, 200) > 0
    assert torch.equal(poisoned.data.labels[beside], data.labels[beside])
    got = poisoned.data.images[beside]
    for other in (data.images[beside], attack.apply_bytes(data.images[beside])):
        assert (got != other).flatten(1).any(1).all()


@CONTRACT
def test_companions_are_as_many_as_are_left(name, ready):
    attack = ready(name, SHAPE)
    if not attack.clean_label:
        poisoned = attack.poison(random_set(), rate=1, seed=0)
        assert (poisoned.roles == Role.POISONED).all()


@DIRTY
def test_dirty_label_draws_from_all_classes_and_flips_labels(name, ready):
    poisoned = ready(name, SHAPE, target=1).poison(random_set(), rate=0.3, seed=0)
    chosen = poisoned.indices(Role.POISONED)
    assert set(poisoned.true_labels[chosen].tolist()) == {0, 1, 2, 3, 4}
    assert (poisoned.data.labels[chosen] == 1).all()


@DIRTY
def test_all_to_all_poison_moves_every_label_on(name, ready):
    attack = ready(name, SHAPE, label_rule="all_to_all")
    poisoned = attack.poison(random_set(), rate=0.3, seed=0)
    chosen = poisoned.indices(Role.POISONED)
    assert torch.equal(poisoned.data.labels[chosen], (poisoned.true_labels[chosen] + 1) % 5)


@CLEAN
def test_clean_label_draws_from_the_target_and_keeps_labels(name, ready):
    data = random_set()
    poisoned = ready(name, SHAPE, target=1).poison(data, rate=0.1, seed=0)
    chosen = poisoned.indices(Role.POISONED)
    assert (data.labels[chosen] == 1).all()
    assert torch.equal(poisoned.data.labels, data.labels)


@CONTRACT
@pytest.mark.parametrize(
    ("rate", "rate_of", "count"),
    [(0.1, "dataset", 20), (0.013, "dataset", 3), (0.1, "target_class", 4), (1, "target_class", 40)],
)
def test_count_of_poisoned_images(name, rate, rate_of, count, ready):
    attack, data = ready(name, SHAPE, target=1), random_set()
    poisoned = attack.poison(data, rate=rate, rate_of=rate_of, seed=0)
    assert len(poisoned.indices(Role.POISONED)) == count
    share = attack.share(data, rate=rate, rate_of=rate_of)
    assert share == pytest.approx(rate if rate_of == "dataset" else rate / 5)


@CONTRACT
def test_the_seed_decides_who_is_poisoned(name, ready):
    attack = ready(name, SHAPE)
    one, same, other = (
        attack.poison(random_set(), rate=0.1, seed=seed).indices(Role.POISONED) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@CLEAN
def test_more_than_the_target_class_is_refused_with_the_range(name):
    with pytest.raises(DataError, match=r"50 images.* 1 to 40 here.*between 0\.005 and 0\.2"):
        build_attack(name).share(random_set(), rate=0.25)
    with pytest.raises(DataError, match="50 images"):
        build_attack(name).poison(random_set(), rate=0.25, seed=0)


@CONTRACT
def test_a_rate_that_selects_nothing_is_refused(name):
    with pytest.raises(DataError, match="is 0 images"):
        build_attack(name).poison(random_set(), rate=0.001, seed=0)


@CONTRACT
@pytest.mark.parametrize("rate_of", ["dataset", "target_class"])
def test_a_target_class_without_images(name, rate_of, ready):
    data = random_set()
    others = data.subset(data.labels != 0)
    attack = ready(name, SHAPE, target=0)
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
        (AdaptiveBlend(alpha=0.001), 128),
        (BPP(), 0),
        (LabelConsistent(size=1), 255),
    ],
    ids=lambda value: value if isinstance(value, int) else type(value).__name__,
)
def test_a_null_trigger_is_refused(attack, value):
    images = torch.full((10, 1, 12, 12), value, dtype=torch.uint8)
    data = ImageData(images, torch.arange(10) % 2, ("a", "b"))
    with pytest.raises(DataError, match="null trigger"):
        attack.triggered(data)


def test_unknown_attacks_and_settings_are_refused_with_the_known_ones():
    with pytest.raises(SettingError, match="'trojan'.*badnets, blended, bpp, .*ssba, wanet"):
        build_attack("trojan")
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
        ("adaptive_blend", {"alpha": 0}),
        ("adaptive_blend", {"train_alpha": 1.1}),
        ("adaptive_blend", {"pieces": 0}),
        ("adaptive_blend", {"piece_share": 0.01}),
        ("adaptive_blend", {"piece_share": 2}),
        ("adaptive_blend", {"cover_ratio": -1}),
        ("bpp", {"squeeze_num": 1}),
        ("bpp", {"squeeze_num": 256}),
        ("bpp", {"squeeze_num": 7.5}),
        ("bpp", {"negative_rate": 1}),
        ("input_aware", {"mask_epochs": -1}),
        ("input_aware", {"lr": 0}),
        ("input_aware", {"mask_density": 1}),
        ("input_aware", {"mask_levels": 4}),
        ("input_aware", {"mask_width": 0}),
        ("input_aware", {"diversity": math.nan}),
        ("input_aware", {"cross_ratio": -1}),
        ("label_consistent", {"size": 0}),
        ("label_consistent", {"steps": 0}),
        ("label_consistent", {"amplitude": 0}),
        ("label_consistent", {"budget": 2}),
        ("low_frequency", {"amplitude": 0}),
        ("low_frequency", {"cutoff": 1}),
        ("low_frequency", {"steps": 1.5}),
        ("ssba", {"bits": 0}),
        ("ssba", {"steps": -1}),
        ("ssba", {"strength": 0}),
        ("wanet", {"grid_size": 1}),
        ("wanet", {"strength": math.nan}),
        ("wanet", {"cross_ratio": -1}),
    ],
)
def test_settings_out_of_range_or_of_another_type_are_refused(name, settings):
    with pytest.raises(SettingError):
        build_attack(name, **settings)


@CONTRACT
def test_settings_are_given_by_name(name):
    kinds = {p.kind for p in inspect.signature(ATTACKS[name]).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


def test_what_does_not_fit_the_image_is_refused(ready):
    with pytest.raises(SettingError, match="Four checkers of 3 pixels do not fit images of 5x9"):
        LabelConsistent().apply(noise(1, 1, 5, 9))
    with pytest.raises(SettingError, match=r"made for images \(3, 32, 32\), got \(3, 32, 16\)"):
        ready("low_frequency").apply(noise(1, 3, 32, 16))
    for name in ("ssba", "input_aware"):
        with pytest.raises(SettingError, match="made for 3 channels, got 1"):
            ready(name).apply(noise(1, 1))


def test_a_patch_larger_than_the_image_is_refused():
    with pytest.raises(SettingError, match="9 pixels does not fit images of 8x20"):
        BadNets(size=9).apply(noise(1, 1, 8, 20))
