import pytest
import torch

from bimask.detection.defences.base import Pictures
from bimask.detection.defences.perturbed import Ball, perturbed


def some():
    generator = torch.Generator().manual_seed(4)
    images = [
        torch.rand(3, 8, 9, generator=generator).round(),
        torch.rand(3, 12, 7, generator=generator),
    ]
    targets = [
        {"boxes": torch.tensor([[1.0, 2.0, 4.0, 6.0]]), "labels": torch.tensor([0])},
        {
            "boxes": torch.tensor([[0.0, 0.0, 3.0, 3.0], [2.0, 5.0, 7.0, 12.0]]),
            "labels": torch.tensor([0, 1]),
        },
    ]
    return Pictures(images, targets)


def towards_white(images):
    return -torch.stack([image.sum() for image in images]).sum()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("region", ["picture", "boxes", "patches"])
def test_it_stays_in_the_ball_in_zero_to_one_and_in_its_region(region):
    pictures, ball = some(), Ball(0.2, 4, region)
    for goal in (towards_white, lambda images: -towards_white(images)):
        found = perturbed(pictures, goal, ball, seeded())
        for image, other, target in zip(pictures.images, found, pictures.labels, strict=True):
            assert other.min() >= 0
            assert other.max() <= 1
            assert (other - image).abs().max() <= 0.2 + 1e-6
            assert not other.requires_grad
            moved = (other != image).any(0)
            free = torch.zeros_like(moved)
            for x0, y0, x1, y1 in target["boxes"].long().tolist():
                free[y0:y1, x0:x1] = True
            assert region == "picture" or not moved[~free].any()
            assert moved[free].any()
            assert region != "patches" or not moved[free].all()


def test_a_linear_goal_is_reached_at_the_edge_of_the_ball_or_at_white():
    pictures = some()
    found = perturbed(pictures, towards_white, Ball(0.2, 4), seeded())
    for image, other in zip(pictures.images, found, strict=True):
        torch.testing.assert_close(other, (image + 0.2).clamp(max=1))


def test_it_starts_where_the_generator_says():
    pictures, ball = some(), Ball(0.2, 1)

    def flat(images):
        return 0 * towards_white(images)

    first, again, other = (perturbed(pictures, flat, ball, seeded(s)) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    moves = torch.cat([(a - x).flatten() for a, x in zip(first, pictures.images, strict=True)])
    assert moves.abs().max() > 0.15


def test_the_pictures_are_left_as_they_are():
    pictures = some()
    before = [image.clone() for image in pictures.images]
    perturbed(pictures, towards_white, Ball(0.2, 2), seeded())
    assert all(torch.equal(a, b) for a, b in zip(pictures.images, before, strict=True))


def test_patches_are_squares_of_every_size_and_place_that_a_box_has_room_for():
    boxes = torch.tensor([[4.0, 6.0, 24.0, 16.0]])
    one = Pictures([torch.full((3, 20, 30), 0.5)], [{"boxes": boxes, "labels": torch.zeros(1).long()}])
    places, sides = set(), set()
    for seed in range(60):
        (found,) = perturbed(one, towards_white, Ball(0.2, 3, "patches"), seeded(seed))
        rows, columns = (found[0] != 0.5).nonzero().T
        high, wide = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
        assert len(rows) == high * wide
        assert high == wide
        assert 4 <= wide <= 10
        assert rows.min() >= 6
        assert rows.max() < 16
        assert columns.min() >= 4
        assert columns.max() < 24
        places.add((int(rows.min()), int(columns.min())))
        sides.add(int(wide))
    assert len(places) > 30
    assert sides == set(range(4, 11))
