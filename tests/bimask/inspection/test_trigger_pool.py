"""Triggers that the defence learns against beside those of the inner problem."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bimask import PurifyConfig, purify
from bimask.defences.ims.population import PopulationPurifier
from bimask.errors import DataError, SettingError
from bimask.inspection.class_triggers import ClassTriggers, Patch, Pattern
from bimask.inspection.trigger_pool import APART, CHEAPEST, MOST, SEARCHES, STRONGER, TriggerPool, draws

SHORT = {
    "initialise_rounds": 1,
    "minimise_rounds": 2,
    "select_rounds": 2,
    "inner_steps": 1,
    "step_size": 0.01,
    "budget": 0.01,
    "initial_selection": 0.9,
}


class Quadrants(nn.Module):
    """Four classes: the brightest quarter. A bright top left pixel beside a dark one means class 2."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 4, bias=False)
        backdoor = 20 * F.one_hot(torch.tensor([2]), 4).T
        with torch.no_grad():
            self.head.weight.copy_(torch.cat([12 * torch.eye(4), backdoor], 1))

    def forward(self, images):
        means = F.adaptive_avg_pool2d(images, 2).flatten(1)
        return self.head(torch.cat([means, images[:, 0, 0, :1] - images[:, 0, 0, 1:2]], 1))


@pytest.fixture(scope="module")
def quarters():
    images = 0.2 * torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for i in range(20):
        row, column = divmod(i % 4, 2)
        images[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.7
    return images


@pytest.fixture(scope="module")
def pool(quarters):
    return TriggerPool.search(Quadrants(), quarters)


def white(classes=1):
    """A pool of one trigger that paints everything white."""
    patch = Patch(classes, (1, 8, 8)).requires_grad_(False)
    patch.cover.fill_(1e9)
    patch.paint.fill_(1e9)
    found = ClassTriggers("patch", torch.ones(classes), torch.ones(classes), patch)
    return TriggerPool((found,), torch.full((classes,), 1 / classes))


def test_the_class_with_the_short_cut_is_asked_most_and_every_class_by_many(pool):
    others = pool.weights[[0, 1, 3]].unique().tolist()
    assert len(others) == 1
    assert pool.weights[2] == pytest.approx(1 - 3 * others[0])
    assert pool.weights[2] == pytest.approx(0.84, abs=0.01)  # 0.85 if it cost nothing beside the others
    families = Counter(found.family for found in pool.triggers)
    assert families == dict.fromkeys(["patch", "pattern", "warp", "tone"], SEARCHES)
    assert [len(found.price) for found in pool.triggers] == [4] * 4 + [CHEAPEST] * 8
    assert (pool.rows[:, 2] >= 0).all()
    assert ((pool.rows >= 0).sum(1) == torch.tensor([4] * 4 + [CHEAPEST] * 8)).all()


@pytest.mark.parametrize(
    ("prices", "apart"),
    [
        ([1.0, 1.0, 1.0, 1.0], 0.0),
        ([1.0, 2.0, 4.0, 3.0], 0.5),
        ([5.0, 1.0, 4.0, float("inf")], 0.75),
        ([float("inf"), 2.0, float("inf"), float("inf")], 1.0),
        ([float("inf")] * 4, 0.0),
    ],
)
def test_the_cheapest_class_is_drawn_as_far_as_it_stands_apart(prices, apart):
    prices = torch.tensor(prices, dtype=torch.float64)
    weights = draws(prices.log())
    expected = torch.full((4,), (1 - APART * apart) / 4, dtype=torch.float64)
    expected[prices.argmin()] += APART * apart
    torch.testing.assert_close(weights, expected)


def test_of_many_classes_the_cheapest_are_asked():
    prices = torch.arange(100, 0, -1).double()
    weights = draws(prices.log())
    assert weights.nonzero().flatten().tolist() == list(range(100 - MOST, 100))
    assert weights.sum().item() == pytest.approx(1)
    assert weights[-1].item() == pytest.approx((1 - APART / 2) / MOST + APART / 2)
    assert weights[-2].item() == pytest.approx((1 - APART / 2) / MOST)


def test_no_two_searches_find_the_same_and_the_same_call_does(pool, quarters):
    generator = torch.Generator().manual_seed(0)
    drawn = pool.on(quarters[:1].expand(400, -1, -1, -1), generator)
    assert len(drawn.flatten(1).unique(dim=0)) > 4 * len(pool.triggers) / 2
    again, generator = TriggerPool.search(Quadrants(), quarters), torch.Generator().manual_seed(0)
    assert torch.equal(drawn, again.on(quarters[:1].expand(400, -1, -1, -1), generator))


def test_its_patches_follow_the_short_cut(pool, quarters):
    patches = [found for found in pool.triggers if found.family == "patch"]
    rows = [row for found, row in zip(pool.triggers, pool.rows, strict=True) if found.family == "patch"]
    for found, row in zip(patches, rows, strict=True):
        triggered = found.apply(quarters)[row[2]]
        assert (Quadrants()(triggered).argmax(1) == 2).float().mean() >= 0.8


def test_of_a_classs_triggers_those_that_work_are_drawn(quarters):
    black, paint = white(classes=2).triggers[0], white(classes=2).triggers[0]
    black.made.paint.fill_(-1e9)
    black = replace(black, success=torch.tensor([0.25, 0.0]))
    paint = replace(paint, success=torch.tensor([0.75, 0.0]))
    pool = TriggerPool((black, paint), torch.tensor([0.6, 0.4]))
    torch.testing.assert_close(
        pool.chances, torch.tensor([[0.15, 0.2], [0.45, 0.2]]), check_dtype=False
    )
    generator = torch.Generator().manual_seed(0)
    painted = pool.on(quarters[:1].expand(1000, -1, -1, -1), generator).mean((1, 2, 3))
    assert painted.mean().item() == pytest.approx(0.65, abs=0.04)


class Turning(Quadrants):
    """The bright top left pixel beside a dark one leads each class to the one after it."""

    def forward(self, images):
        means = 12 * F.adaptive_avg_pool2d(images, 2).flatten(1)
        turned = means.roll(1, 1)
        there = (4 * (images[:, 0, 0, :1] - images[:, 0, 0, 1:2])).clamp(0, 1)
        return means * (1 - there) + turned * there


def test_where_each_class_leads_to_another_triggers_towards_any_are_drawn(quarters):
    model = Turning()
    pool = TriggerPool.search(model, quarters)
    assert len(pool.weights) == 5
    assert pool.weights.argmax() == 4
    assert (pool.rows[:, 4] >= 0).all()
    with torch.no_grad():
        before = model(quarters).argmax(1)
        for found, row in zip(pool.triggers, pool.rows[:, 4], strict=True):
            if found.family == "patch":
                led = model(found.apply(quarters)[row]).argmax(1)
                assert (led != before).float().mean() >= 0.8


@pytest.mark.parametrize(("family", "reached"), [("pattern", 0.2 * STRONGER), ("warp", 0.2)])
def test_images_get_up_to_twice_what_was_found_but_of_a_warp_just_that(family, reached):
    made = Pattern(1, (1, 8, 8)).requires_grad_(False)
    made.added.fill_(0.2)
    found = ClassTriggers(family, torch.ones(1), torch.ones(1), made)
    pool = TriggerPool((found,), torch.ones(1))
    put = pool.on(torch.full((500, 1, 8, 8), 0.3), torch.Generator().manual_seed(0)) - 0.3
    assert put.amin() >= 0.2 - 1e-6
    assert put.amax().item() == pytest.approx(reached, abs=0.01)
    assert pool.on(torch.full((500, 1, 8, 8), 0.9), None).amax() <= 1


@pytest.mark.parametrize("model", [Quadrants, Turning])
def test_every_step_is_told(quarters, model):
    told = []
    TriggerPool.search(model(), quarters, on_step=lambda: told.append(1))
    assert len(told) == TriggerPool.steps(4, len(quarters))


def test_a_single_image_is_refused(quarters):
    with pytest.raises(DataError, match=r"two clean images or more, got 1\."):
        TriggerPool.search(Quadrants(), quarters[:1])


def test_a_model_of_one_class_is_refused(quarters):
    one = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    with pytest.raises(SettingError, match=r"has one class; set `class_triggers` to 0\."):
        TriggerPool.search(one, quarters)


def test_every_image_draws_a_class_by_the_weights(quarters):
    pool = white(classes=2)
    pool.triggers[0].made.paint[0] = -1e9  # class 0 paints black
    pool = TriggerPool(pool.triggers, torch.tensor([0.2, 0.8], dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    painted = pool.on(quarters[:1].expand(400, -1, -1, -1), generator).mean((1, 2, 3))
    assert painted.unique().tolist() == [0, 1]
    assert painted.mean().item() == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.3, 6), (1.0, 20)])
def test_so_many_images_get_a_trigger_of_the_pool_and_others_the_inner_problems(tiny_net, share, count):
    images = 0.9 * torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    config = PurifyConfig(**SHORT, class_triggers=share)
    population = PopulationPurifier(tiny_net, images, [config], pool=white())
    objective, group = population.objective, population.members
    group[0].stages.pop(0)  # from initialise, which has no triggers
    x, clean = images[None], objective.clean_logits[None]
    inverse = torch.full((1, len(population.blank.mask)), 0.5)
    found, answered = objective._triggered(group, group[0].shared(20), None, x, clean, inverse)
    is_white = (found[0] == 1).flatten(1).all(1)
    assert is_white.sum() == count
    assert ((found[0] - images).abs().amax((1, 2, 3))[~is_white] <= 0.011).all()
    torch.testing.assert_close(answered[0], tiny_net(found[0]), rtol=0, atol=1e-5, check_dtype=False)


def test_a_pool_known_from_before_gives_the_same_masks(tiny_net, pictures):
    config = PurifyConfig(**SHORT, class_triggers=0.5)

    def learned(config, **known):
        generator = torch.Generator().manual_seed(0)
        return purify(tiny_net, pictures, config, generator=generator, **known).masks.mask

    searched = learned(config)
    assert torch.equal(searched, learned(config, pool=TriggerPool.search(tiny_net, pictures)))
    assert not torch.equal(searched, learned(PurifyConfig(**SHORT)))
