from itertools import product

import numpy as np
import pytest

from study.analysis.pareto import ParetoFront, choose, hypervolume, losses, non_dominated
from study.spec.directions import OBJECTIVES


def brute_force_front(values):
    return [not any((other <= row).all() and (other < row).any() for other in values) for row in values]


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_front_is_the_brute_force_front(objectives):
    rng = np.random.default_rng(0)
    for n in range(1, 30):
        values = rng.integers(0, 5, (n, objectives)).astype(float)  # ties and duplicates abound
        assert non_dominated(values).tolist() == brute_force_front(values)


def test_front_does_not_depend_on_the_order_and_ignores_dominated_points():
    values = np.random.default_rng(1).random((40, 2))
    order = np.random.default_rng(2).permutation(40)
    assert (non_dominated(values)[order] == non_dominated(values[order])).all()
    worse = np.vstack([values, values.max(0) + 1])
    assert non_dominated(worse).tolist() == [*non_dominated(values).tolist(), False]


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_hypervolume_of_a_staircase(n):
    """n points on the anti-diagonal below (n, n): n^2 - n(n-1)/2 in the plane."""
    stairs = np.array([[i, n - 1 - i] for i in range(n)], dtype=float)
    assert hypervolume(stairs, np.array([n, n], float)) == n * n - n * (n - 1) // 2


@pytest.mark.parametrize("n", [1, 2, 4])
def test_hypervolume_of_a_staircase_in_three_dimensions(n):
    """All points with sum n-1 below (n, n, n): n^3 - (n-1) n (n+1) / 6."""
    stairs = np.array([p for p in product(range(n), repeat=3) if sum(p) == n - 1], dtype=float)
    assert hypervolume(stairs, np.full(3, float(n))) == n**3 - (n - 1) * n * (n + 1) // 6


@pytest.mark.parametrize("objectives", [2, 3])
def test_hypervolume_is_what_counting_cells_gives(objectives):
    rng = np.random.default_rng(3)
    for _ in range(20):
        values = rng.integers(0, 6, (7, objectives))
        cells = np.array(list(product(range(6), repeat=objectives)))
        counted = (cells[:, None] >= values[None]).all(2).any(1).sum()
        assert hypervolume(values.astype(float), np.full(objectives, 6.0)) == counted


def test_hypervolume_counts_nothing_beyond_the_reference_and_duplicates_once():
    reference = np.array([1.0, 1.0])
    point = np.array([[0.5, 0.25]])
    assert hypervolume(np.empty((0, 2)), reference) == 0
    assert hypervolume(np.array([[0.2, 1.0], [2.0, 0.1]]), reference) == 0
    assert hypervolume(np.vstack([point, point, [[0.9, 1.5]]]), reference) == pytest.approx(0.375)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 1])
def test_values_that_are_not_finite_are_refused_wherever_they_stand(bad, row):
    points = [{"clean_accuracy": 0.9, "attack_success": 0.1} for _ in range(2)]
    points[row] = {"clean_accuracy": bad, "attack_success": 0.1}
    with pytest.raises(ValueError, match="finite"):
        losses(points, OBJECTIVES)


def test_directions_and_reference_of_a_front():
    points = [
        {"clean_accuracy": 0.9, "attack_success": 0.5},
        {"clean_accuracy": 0.8, "attack_success": 0.1},
        {"clean_accuracy": 0.8, "attack_success": 0.5},
    ]
    front = ParetoFront.of(points)
    assert front.indices == (0, 1)
    # two rectangles beside the reference (0.5, 1): 0.4 x 0.5 + 0.3 x 0.4
    reference = {"clean_accuracy": 0.5, "attack_success": 1.0}
    assert front.hypervolume(reference) == pytest.approx(0.4 * 0.5 + 0.3 * 0.4)


def test_choice_is_the_least_attack_success_among_the_accurate_ones():
    points = [
        {"clean_accuracy": 0.99, "attack_success": 0.90},
        {"clean_accuracy": 0.97, "attack_success": 0.02},
        {"clean_accuracy": 0.98, "attack_success": 0.02},
        {"clean_accuracy": 0.60, "attack_success": 0.00},
    ]
    assert choose(points, min_clean_accuracy=0.97) == 2
    assert choose(points, min_clean_accuracy=0.5) == 3
    assert choose(points, min_clean_accuracy=0.995) is None
    assert choose([], min_clean_accuracy=0.0) is None
    for bound in (0.0, 0.97, 0.985):
        assert choose(points, min_clean_accuracy=bound) in ParetoFront.of(points).indices


def test_what_is_as_good_as_the_least_is_chosen_by_accuracy():
    points = [
        {"clean_accuracy": 0.97, "attack_success": 0.0},
        {"clean_accuracy": 0.99, "attack_success": 0.01},
        {"clean_accuracy": 0.99, "attack_success": 0.005},
        {"clean_accuracy": 1.0, "attack_success": 0.02},
    ]
    assert choose(points, min_clean_accuracy=0.9) == 0
    assert choose(points, min_clean_accuracy=0.9, tolerance=0.01) == 2
    assert choose(points, min_clean_accuracy=0.995, tolerance=0.01) == 3
    assert choose(points, min_clean_accuracy=1.1, tolerance=0.01) is None
