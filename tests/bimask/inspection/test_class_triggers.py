"""Universal triggers towards every class."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bimask.errors import DataError
from bimask.inspection.class_triggers import (
    ANY,
    FAMILIES,
    IMAGES_PER_PASS,
    ClassTriggers,
    find_class_triggers,
    steps_of,
)


class Quadrants(nn.Module):
    """Four classes: the brightest quarter of the image. With a `backdoor`, a bright top left pixel with
    a
    dark neighbour means that class."""

    def __init__(self, backdoor=None):
        super().__init__()
        self.backdoor = backdoor

    def forward(self, images):
        logits = 12 * F.adaptive_avg_pool2d(images, 2).flatten(1)
        if self.backdoor is not None:
            sign = images[:, 0, 0, 0] - images[:, 0, 0, 1]
            logits = logits + 20 * sign[:, None] * F.one_hot(torch.tensor(self.backdoor), 4)
        return logits


@pytest.fixture
def quarters():
    """Three faint-noised images of each class, (12, 1, 8, 8)."""
    images = 0.2 * torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for i in range(12):
        row, column = divmod(i % 4, 2)
        images[i, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.7
    return images


@pytest.mark.parametrize("family", FAMILIES)
def test_triggers_keep_the_range_and_the_size_is_none_without_one(family, quarters):
    triggers = FAMILIES[family](3, (1, 8, 8))
    with torch.no_grad():
        for parameter in triggers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        images = triggers(quarters)
        assert images.shape == (3, 12, 1, 8, 8)
        assert images.min() >= 0
        assert images.max() <= 1
        assert (triggers.size() > 0).all()
        for parameter in triggers.parameters():
            parameter.fill_(-1e9 if family == "patch" else 0)  # a patch of no pixel; no change at all
        torch.testing.assert_close(triggers(quarters), quarters.expand(3, -1, -1, -1, -1))
        assert (triggers.size() == 0).all()


def test_a_patch_replaces_what_it_covers(quarters):
    triggers = FAMILIES["patch"](1, (1, 8, 8))
    with torch.no_grad():
        triggers.cover.fill_(-1e9)[..., 2:4, 2:4] = 1e9
        triggers.paint.fill_(1e9)
        images = triggers(quarters)[0]
        assert triggers.size().item() == 4
    assert (images[..., 2:4, 2:4] == 1).all()
    assert torch.equal(images[..., 4:, :], quarters[..., 4:, :])


def test_a_warp_moves_by_pixels(quarters):
    triggers = FAMILIES["warp"](1, (1, 8, 8))
    with torch.no_grad():
        triggers.moved.zero_()[:, 0] = 1
        moved = triggers(quarters)[0]
    torch.testing.assert_close(moved[..., :-1], quarters[..., 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_some_classes_alone_get_the_triggers_that_they_get_among_all(family, quarters):
    model = Quadrants(backdoor=2)
    some = find_class_triggers(model, quarters, family, towards=torch.tensor([3, 1]))
    everything = find_class_triggers(model, quarters, family)
    torch.testing.assert_close(some.price, everything.price[[3, 1]])
    torch.testing.assert_close(
        some.apply(quarters), everything.apply(quarters)[[3, 1]], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_each_image_gets_the_trigger_of_its_class(family):
    pictures = torch.rand(6, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    made = FAMILIES[family](4, (3, 9, 7)).requires_grad_(False)
    for parameter in made.parameters():
        parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    found = ClassTriggers(family, torch.ones(4), torch.ones(4), made)
    rows = torch.tensor([3, 0, 0, 2, 1, 3])
    expected = found.apply(pictures)[rows, torch.arange(6)]
    torch.testing.assert_close(found.apply_each(pictures, rows), expected)
    some = found.of(torch.tensor([3, 1]))
    torch.testing.assert_close(some.apply(pictures), found.apply(pictures)[[3, 1]])
    assert found.apply_each(pictures[:0], rows[:0]).shape == (0, 3, 9, 7)


def test_a_planted_backdoor_is_the_cheapest_patch(quarters):
    found = find_class_triggers(Quadrants(backdoor=2), quarters, "patch")
    assert found.price.argmin() == 2
    assert found.success[2] == 1
    clean = find_class_triggers(Quadrants(), quarters, "patch")
    assert found.price[2] < 0.5 * clean.price[2]
    others = [0, 1, 3]
    # the other classes pay the same with and without it
    torch.testing.assert_close(found.price[others], clean.price[others], rtol=0.2, atol=0)


def test_the_price_is_what_the_formula_says(quarters):
    model = Quadrants()
    found = find_class_triggers(model, quarters, "pattern")
    triggered = found.apply(quarters)
    answers = model(quarters).argmax(1)
    for k in range(4):
        others = answers != k
        logits = model(triggered[k][others])
        loss = F.cross_entropy(logits, torch.full((int(others.sum()),), k))
        size = (found.made.added[k] ** 2).sum()
        assert found.price[k].item() == pytest.approx((loss + 0.5 * size).item(), rel=1e-5)
        assert found.success[k].item() == pytest.approx((logits.argmax(1) == k).float().mean().item())


def test_the_price_of_any_other_class_is_what_the_formula_says(quarters):
    model = Quadrants()
    found = find_class_triggers(model, quarters, "pattern", towards=torch.tensor([1, ANY]))
    with torch.no_grad():
        answers, logits = model(quarters).argmax(1), model(found.apply(quarters)[1])
    own = logits.softmax(1).gather(1, answers[:, None])
    price = -torch.log(1 - own).mean() + 0.5 * (found.made.added[1] ** 2).sum()
    assert found.price[1].item() == pytest.approx(price.item(), rel=1e-4)
    assert found.success[1].item() == pytest.approx((logits.argmax(1) != answers).float().mean().item())
    alone = find_class_triggers(model, quarters, "pattern", towards=torch.tensor([1]))
    assert found.price[0].item() == pytest.approx(alone.price[0].item(), rel=1e-4)


def test_classes_of_one_pass_and_of_many_are_alike(quarters, monkeypatch):
    whole = find_class_triggers(Quadrants(), quarters, "patch")
    monkeypatch.setattr("bimask.inspection.class_triggers.IMAGES_PER_PASS", 12)
    calls = []
    parts = find_class_triggers(Quadrants(), quarters, "patch", on_step=lambda: calls.append(1))
    torch.testing.assert_close(parts.price, whole.price)
    torch.testing.assert_close(parts.apply(quarters), whole.apply(quarters))
    assert len(calls) == steps_of("patch", 4, 12) == 4 * FAMILIES["patch"].steps


def test_the_model_keeps_no_gradient(tiny_net, pictures):
    find_class_triggers(tiny_net, pictures, "warp")
    assert all(parameter.grad is None for parameter in tiny_net.parameters())
    assert len(pictures) < IMAGES_PER_PASS


def test_a_class_that_all_images_are_of_has_no_price(quarters):
    only_first = quarters[::4]
    found = find_class_triggers(Quadrants(), only_first, "pattern")
    assert found.price[0] == torch.inf
    assert found.price[1:].isfinite().all()


def test_no_images_are_refused(tiny_net, pictures):
    with pytest.raises(DataError, match="at least one"):
        find_class_triggers(tiny_net, pictures[:0], "patch")


def test_tone_maps_brightness_to_brightness(quarters):
    triggers = FAMILIES["tone"](1, (1, 8, 8))
    with torch.no_grad():
        for level in range(17):  # the negative
            triggers.offset[0, 0, level] = 1 - 2 * level / 16
        torch.testing.assert_close(triggers(quarters)[0], 1 - quarters)
        ends = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
        assert triggers(ends).flatten().tolist() == [1.0, 0.0]
