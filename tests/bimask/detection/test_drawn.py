"""Drawn pictures: boxes where objects are, names beside them, pixels left alone elsewhere."""

import numpy as np
import pytest
import torch

from bimask.detection.drawn import COLOURS, draw_objects, side_by_side

IMAGE = torch.zeros(3, 96, 96, dtype=torch.uint8)
CLASSES = ("a", "b" * 500, "evil\x1b[2J\n")


def objects(boxes, labels, scores=None):
    found = {"boxes": torch.tensor(boxes).view(-1, 4), "labels": torch.tensor(labels).long()}
    return found if scores is None else found | {"scores": torch.tensor(scores)}


def rgb(colour):
    return tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))


def where(picture, colour):
    """Rows and columns of a colour."""
    return (np.array(picture) == rgb(colour)).all(2).nonzero()


def test_a_box_is_drawn_where_its_object_is_in_enlarged_pixels():
    picture = draw_objects(IMAGE, objects([[40.0, 50.0, 60.0, 80.0]], [0]), CLASSES)
    assert picture.size == (288, 288)
    rows, columns = where(picture, COLOURS[0])
    assert columns.min() == 120
    assert columns.max() == 179
    assert rows.max() == 239
    assert 135 < rows.min() < 150  # the name's plate stands on the box's upper edge
    inner = np.array(picture)[152:238, 122:178]
    assert not inner.any()


def test_unsure_objects_are_left_out():
    found = objects([[10.0, 40.0, 30.0, 60.0], [50.0, 40.0, 70.0, 60.0]], [0, 1], [0.9, 0.1])
    picture = draw_objects(IMAGE, found, CLASSES)
    assert len(where(picture, COLOURS[0])[0])
    assert not len(where(picture, COLOURS[1])[0])
    assert len(where(draw_objects(IMAGE, found, CLASSES, least=0.05), COLOURS[1])[0])


@pytest.mark.parametrize(
    "box", [[0.0, 0.0, 96.0, 96.0], [-20.0, -5.0, 3.0, 4.0], [95.0, 95.0, 95.5, 95.2]]
)
@pytest.mark.parametrize("label", [0, 1, 2])
def test_odd_boxes_and_names_are_drawn_as_well(box, label):
    picture = draw_objects(IMAGE, objects([box], [label], [0.5]), CLASSES)
    assert len(where(picture, COLOURS[label])[0])


def test_a_picture_without_objects_and_a_large_one_stay_as_they_are():
    large = torch.randint(256, (3, 300, 500), dtype=torch.uint8)
    picture = draw_objects(large, objects([], []), CLASSES)
    assert np.array_equal(np.array(picture), large.permute(1, 2, 0).numpy())


def test_pictures_stand_in_a_row():
    one = draw_objects(IMAGE, objects([], []), CLASSES)
    row = np.array(side_by_side([one, one]))
    assert row.shape == (288, 582, 3)
    assert (row[:, 288:294] == 255).all()
    assert not row[:, :288].any()
