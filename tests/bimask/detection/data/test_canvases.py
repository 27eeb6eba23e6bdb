"""Digits on canvases: tight boxes apart from each other, and no digit in two splits."""

import pytest
import torch
from torchvision.ops import box_iou

from bimask.data import load_data
from bimask.detection.data import canvases


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", image_size=8)


def made(digits, seed=0, count=40):
    return canvases(digits.train, count, generator=torch.Generator().manual_seed(seed))


def test_equal_seeds_make_equal_canvases_and_others_others(digits):
    assert made(digits).digest == made(digits).digest != made(digits, seed=1).digest
    # a part of a larger set is the smaller one
    assert made(digits).subset(range(5)).digest == made(digits, count=5).digest


def test_boxes_lie_inside_apart_and_have_sizes_of_enlarged_digits(digits):
    data = made(digits)
    counts = set()
    for image, target in zip(data.images, data.targets, strict=True):
        boxes = target["boxes"]
        counts.add(len(boxes))
        assert image.shape == (3, 96, 96)
        assert boxes.min() >= 0
        assert boxes.max() <= 96
        overlap = box_iou(boxes, boxes) - torch.eye(len(boxes))
        assert overlap.max() < 0.05
        sides = boxes[:, 2:] - boxes[:, :2]
        assert (sides.amax(1) >= 16).all()
        assert (sides.amax(1) <= 28).all()
    assert counts == {1, 2, 3}


def test_a_box_is_tight_around_the_bright_digit(digits):
    """Of a canvas with one digit alone: bright pixels touch all four edges from inside, none lies far
    outside."""
    data = made(digits)
    for image, target in zip(data.images, data.targets, strict=True):
        if len(target["boxes"]) != 1:
            continue
        x0, y0, x1, y1 = target["boxes"][0].int().tolist()
        ground = image.float().mean(0)
        inside = ground[y0:y1, x0:x1]
        level = ground.clone()
        level[y0:y1, x0:x1] = 0
        bright = level.max() + 0.3 * (inside.max() - level.max())
        lit = (ground > bright).nonzero()
        assert (lit >= torch.tensor([y0, x0])).all()
        assert (lit < torch.tensor([y1, x1])).all()
        assert lit[:, 0].min() - y0 <= 3
        assert y1 - 1 - lit[:, 0].max() <= 3


def test_splits_share_no_digit(digits):
    rows = [
        {one.numpy().tobytes() for one in part.images}
        for part in (digits.train, digits.val, digits.test)
    ]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


@pytest.mark.slow
def test_the_data_set_has_its_counts():
    from bimask.detection.data import digit_canvases

    splits = digit_canvases()
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [2000, 300, 400]
