import pytest
import torch

from bimask.detection import DetectionData
from bimask.errors import DataError


def some(count=6, boxes=((1.0, 2.0, 5.0, 6.0),), labels=(1,)):
    target = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels).long()}
    images = tuple(torch.full((3, 8, 8 + row), row, dtype=torch.uint8) for row in range(count))
    return DetectionData(images, (target,) * count, ("a", "b"))


def test_a_subset_has_the_pictures_asked_for_and_the_same_seed_draws_the_same():
    data = some()
    assert [int(image[0, 0, 0]) for image in data.subset([4, 0]).images] == [4, 0]
    first, again = data.clean_subset(2, seed=3), data.clean_subset(2, seed=3)
    assert len(first) == 4
    assert first.digest == again.digest != data.clean_subset(2, seed=4).digest
    with pytest.raises(DataError, match="there are 6; ask for at most 3"):
        data.clean_subset(4, seed=0)


@pytest.mark.parametrize(
    ("boxes", "labels", "says"),
    [
        ([[1.0, 2.0, 1.0, 6.0]], [0], "one is empty"),
        ([[1.0, 2.0, 5.0, 6.0]], [2], "Labels must lie in 0 to 1"),
        ([[1.0, 2.0, 5.0, 6.0]], [0, 1], "boxes"),
    ],
)
def test_targets_that_cannot_be_are_refused(boxes, labels, says):
    with pytest.raises(DataError, match=says):
        some(1, boxes, labels)


def test_a_picture_without_objects_is_one():
    assert len(some(2, [], [])) == 2
