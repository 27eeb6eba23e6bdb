"""What attacks make before and while a victim is trained: preparation, state, batches."""

import pytest
import torch
from safetensors.torch import load, save

from bimask.attacks import ATTACKS, BadNets, LabelConsistent, Role, build_attack
from bimask.data import ImageData
from bimask.errors import SettingError

SHAPE = (1, 16, 16)
CONTRACT = pytest.mark.parametrize("name", sorted(ATTACKS))
STATEFUL = pytest.mark.parametrize("name", sorted(n for n in ATTACKS if ATTACKS[n].has_state))
DIRTY = pytest.mark.parametrize("name", sorted(n for n in ATTACKS if not ATTACKS[n].clean_label))
BATCHWISE = pytest.mark.parametrize("name", sorted(n for n in ATTACKS if ATTACKS[n].batchwise))


def batch_of(n=40, seed=0):
    return torch.rand(n, *SHAPE, generator=draws(seed)), torch.arange(n) % 5


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def random_set(n=40):
    images = torch.randint(0, 256, (n, *SHAPE), generator=draws(), dtype=torch.uint8)
    return ImageData(images, torch.arange(n) % 10, tuple("abcdefghij"))


def poisoned(attack, images, labels, *, share=0.1, seed=0):
    """A batch of `poison_batch`, and the step that the training would do after it."""
    batch = attack.poison_batch(images, labels, 5, share=share, generator=draws(seed))
    if batch.penalty is not None:
        batch.penalty.backward()
    attack.step()
    return batch


# --- preparation and state ---


@CONTRACT
def test_the_state_is_all_that_new_images_need(name, ready, quick):
    attack, images = ready(name), torch.rand(3, 3, 32, 32, generator=draws())
    state = attack.state()
    assert bool(state) == attack.has_state
    other = build_attack(name, **quick(name))
    other.load_state(load(save(state)))
    assert torch.equal(other.apply(images), attack.apply(images))
    assert all(torch.equal(value, state[key]) for key, value in other.state().items())
    assert other.state().keys() == state.keys()


@CONTRACT
def test_the_seed_decides_the_state_and_nothing_else_does(name, quick, fit_linear):
    states, before = [], torch.random.get_rng_state()
    for seed in (0, 0, 1):
        attack = build_attack(name, **quick(name))
        attack.prepare(random_set(), seed=seed, fit_net=fit_linear)
        states.append(attack.state())
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(1)
        before = torch.random.get_rng_state()
    one, same, other = states
    assert all(torch.equal(value, same[key]) for key, value in one.items())
    if one:
        assert any(not torch.equal(value, other[key]) for key, value in one.items())


@STATEFUL
def test_an_attack_that_is_not_ready_says_what_to_do(name):
    attack = build_attack(name)
    for use in (attack.state, lambda: attack.apply(torch.rand(2, *SHAPE))):
        with pytest.raises(SettingError, match="not ready: call `prepare` .* or `load_state`"):
            use()


def test_poisoning_may_need_preparation_where_the_trigger_does_not():
    attack = LabelConsistent()
    attack.apply(torch.rand(2, *SHAPE))
    with pytest.raises(SettingError, match="LabelConsistent is not ready"):
        attack.poison(random_set(), rate=0.1, seed=0)


@pytest.mark.parametrize("name", ["label_consistent", "low_frequency"])
def test_attacks_that_need_a_net_ask_for_it(name):
    with pytest.raises(SettingError, match="needs a cleanly trained net: give `fit_net`"):
        build_attack(name).prepare(random_set(), seed=0)


@STATEFUL
def test_another_state_is_refused_in_one_sentence(name, ready):
    state = ready(name, SHAPE).state()
    key = next(iter(state))
    damages = [
        {},
        {k: v for k, v in state.items() if k != key},
        state | {key: state[key][None]},
        state | {"more": torch.ones(1)},
    ]
    for damage in damages:
        with pytest.raises(SettingError, match="not the state of a trigger of") as caught:
            ready(name, SHAPE).load_state(damage)
        assert "\n" not in str(caught.value)
    broken = state | {key: torch.full_like(state[key], torch.nan)}
    with pytest.raises(SettingError, match=f"'{key}' holds NaN"):
        ready(name, SHAPE).load_state(broken)


def test_an_attack_without_state_takes_none():
    BadNets().load_state({})
    with pytest.raises(SettingError, match="not the state of a trigger of BadNets .*pattern"):
        BadNets().load_state({"pattern": torch.ones(1)})


# --- batches ---


@DIRTY
def test_the_first_samples_are_poisoned_and_the_next_go_with_them(name, ready):
    attack, (images, labels) = ready(name, SHAPE, target=1), batch_of()
    before = images.clone(), labels.clone()
    batch = poisoned(attack, images, labels)
    beside = attack.companions_wanted(4, 40)
    kinds = [Role.POISONED] * 4 + [attack.companion] * beside + [Role.CLEAN] * (36 - beside)
    assert batch.roles.tolist() == kinds
    assert (batch.labels[:4] == 1).all()
    assert torch.equal(batch.labels[4:], labels[4:])
    changed = (batch.images != images).flatten(1).any(1)
    assert changed[: 4 + beside].all()
    assert torch.equal(batch.images[4 + beside :], images[4 + beside :])
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert batch.images.min() >= 0
    assert batch.images.max() <= 1
    assert batch.images.dtype == torch.float32


@DIRTY
def test_all_to_all_moves_labels_on_in_batches_too(name, ready):
    attack, (images, labels) = ready(name, SHAPE, label_rule="all_to_all"), batch_of()
    batch = poisoned(attack, images, labels)
    assert batch.labels[:4].tolist() == [1, 2, 3, 4]
    assert torch.equal(batch.labels[4:], labels[4:])


@BATCHWISE
def test_a_batch_is_decided_by_its_generator(name, ready):
    images, labels = batch_of()
    one, same, other = (
        poisoned(ready(name, SHAPE), images, labels, seed=seed).images for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("share", "n", "count"), [(0.29, 100, 29), (0.1, 19, 1), (1, 10, 10)])
def test_counts_are_rounded_down(share, n, count):
    batch = poisoned(BadNets(), *batch_of(n), share=share)
    assert (batch.roles == Role.POISONED).sum() == count


def test_below_one_sample_a_batch_gets_one_that_often():
    images, labels = batch_of(4)
    generator = draws()
    counts = [
        (BadNets().poison_batch(images, labels, 5, share=0.1, generator=generator).roles == 1).sum()
        for _ in range(500)
    ]
    assert set(map(int, counts)) == {0, 1}
    assert sum(counts) / 500 == pytest.approx(0.4, abs=0.06)


@BATCHWISE
@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_batches_hold(name, n, ready):
    for share in (0.01, 1):
        batch = poisoned(ready(name, SHAPE), *batch_of(n), share=share)
        assert batch.images.shape == (n, *SHAPE)
        assert batch.images.isfinite().all()


@BATCHWISE
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32), (3, 64)])
def test_batches_of_other_shapes(name, channels, side, ready):
    images = torch.rand(20, channels, side, side, generator=draws())
    batch = poisoned(ready(name, (channels, side, side)), images, torch.arange(20) % 5)
    assert batch.images.shape == images.shape
    assert batch.images.isfinite().all()


def test_input_aware_learns_patterns_with_the_net_and_leaves_masks_alone(ready):
    attack, (images, labels) = ready("input_aware", SHAPE), batch_of()
    before = attack.state()
    before = {key: value.clone() for key, value in before.items()}
    batch = attack.poison_batch(images, labels, 5, share=0.2, generator=draws())
    assert batch.penalty > 0
    batch.images.mean().backward()
    attack.step()
    changed = {key for key, value in attack.state().items() if not torch.equal(value, before[key])}
    assert {key.split(".")[0] for key in changed} == {"pattern"}
    assert "pattern.down.0.0.weight" in changed
    triggered = attack.apply(images)
    assert not triggered.requires_grad
    assert torch.equal(triggered, attack.apply(images))  # statistics rest


def test_input_aware_forgets_the_gradients_of_the_batch_before(ready):
    once, twice = ready("input_aware", SHAPE), ready("input_aware", SHAPE)
    images, labels = batch_of()
    for attack, steps in ((once, 1), (twice, 2)):
        for _ in range(steps):
            batch = attack.poison_batch(images, labels, 5, share=0.2, generator=draws())
            batch.penalty.backward()
            grads = [p.grad.clone() for p in attack._nets["pattern"].parameters()]
            attack.step()
    assert all(p.grad is None for p in twice._nets["pattern"].parameters())
    assert grads


def test_input_aware_diversity_is_that_of_the_pairs(ready):
    from bimask.attacks.input_aware import _diversity

    x1, x2, m1, m2 = (torch.rand(3, 1, 4, 4, generator=draws(i)) for i in range(4))
    by_hand = 0.0
    for i in range(3):
        above = sum((a - b) ** 2 for a, b in zip(x1[i].flatten(), x2[i].flatten(), strict=True)) / 16
        below = sum((a - b) ** 2 for a, b in zip(m1[i].flatten(), m2[i].flatten(), strict=True)) / 16
        by_hand += float(above**0.5 / below**0.5) / 3
    assert _diversity(x1, m1, x2, m2).item() == pytest.approx(by_hand, rel=1e-4)
    same = m1.clone().requires_grad_()
    worst = _diversity(x1, same, x2, m1)
    worst.backward()
    assert worst > 1e4
    assert same.grad.isfinite().all()
