"""How far two answers are apart: what decides whether a packed model is registered."""

import math

import pytest

from study.promotion.packing import apart

OBJECTS = {"boxes": [[0.0, 1.0, 2.0, 3.0]], "labels": ["a"], "scores": [0.5]}


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([], [], 0),
        ([OBJECTS, OBJECTS], [OBJECTS, OBJECTS], 0),
        ([OBJECTS], [{**OBJECTS, "scores": [0.75]}], 0.25),
        ([OBJECTS], [{**OBJECTS, "boxes": [[0.0, 1.5, 2.0, 2.0]]}], 1),
        ([OBJECTS], [{**OBJECTS, "labels": ["b"]}], math.inf),
        ([OBJECTS], [{**OBJECTS, "scores": []}], math.inf),
        ([OBJECTS], [OBJECTS, OBJECTS], math.inf),
        ([OBJECTS], [dict(reversed(OBJECTS.items()))], 0),
        ({"a": 0.25, "b": 0.75}, {"a": 0.5, "b": 0.5}, 0.25),
        ({"a": 0.25}, {"b": 0.25}, math.inf),
        (0.5, "0.5", math.inf),
        (0.5, [0.5], math.inf),
    ],
)
def test_numbers_differ_by_their_distance_and_all_else_without_end(one, other, expected):
    assert apart(one, other) == apart(other, one) == expected


def test_a_number_that_is_none_is_not_within_any_bound():
    for answer in ([math.nan], [math.nan, 0.0], {"a": [0.0, math.nan], "b": 1.0}):
        assert math.isnan(apart(answer, answer))
