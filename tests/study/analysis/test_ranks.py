import math

import pytest

from study.analysis.ranks import critical_difference, rank

# Demsar 2006, table 6: AUC of four variants of C4.5 on 14 data sets, in thousandths; a tie that the
# paper breaks by digits that it does not print (voting) is broken so here, too.
AUC = {
    "C4.5": [763, 599, 954, 628, 882, 936, 661, 583, 775, 1000, 940, 619, 972, 957],
    "C4.5+m": [768, 591, 971, 661, 888, 931, 668, 583, 838, 1000, 962, 666, 981, 978],
    "C4.5+cf": [771, 590, 968, 654, 886, 916, 609, 563, 866, 1000, 965, 614, 975.1, 946],
    "C4.5+m+cf": [798, 569, 967, 657, 898, 931, 685, 625, 875, 1000, 962, 669, 975, 970],
}


def test_ranks_and_tests_are_those_of_the_paper():
    """Mean ranks 3.143, 2.000, 2.893, 1.964; chi-squared 9.28 (p .0258 of 3 degrees); CD 1.25."""
    found = rank(AUC)
    assert found["mean_rank"] == pytest.approx(
        {"C4.5+m+cf": 1.964, "C4.5+m": 2.0, "C4.5+cf": 2.893, "C4.5": 3.143}, abs=1e-3
    )
    assert 0.01 < found["p"] < 0.0258, "the paper's, less by the correction for ties"
    assert found["critical_difference"] == pytest.approx(1.25, abs=5e-3)
    assert found["cliques"] == [["C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"]]
    assert list(found["mean_rank"]) == ["C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"]


@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (5, 2.728), (10, 3.164)])
def test_the_critical_values_are_those_of_table_5(methods, q):
    blocks = 30
    wanted = q * math.sqrt(methods * (methods + 1) / (6 * blocks))
    assert critical_difference(methods, blocks) == pytest.approx(wanted, rel=1e-3)


def test_methods_that_differ_on_every_block_are_told_apart():
    found = rank({name: [level] * 30 for name, level in (("a", 3.0), ("b", 2.0), ("c", 1.0))})
    assert found["mean_rank"] == {"a": 1, "b": 2, "c": 3}
    assert found["p"] < 1e-6
    assert found["cliques"] == [["a"], ["b"], ["c"]]


def test_a_failure_ranks_behind_all_others_and_ties_share_a_rank():
    found = rank({"a": [0.1, math.nan], "b": [0.1, 0.0], "c": [0.5, 0.0]})
    assert found["mean_rank"] == {"c": 1.25, "b": 2.0, "a": 2.75}


def test_two_methods_or_equal_ones_are_not_told_apart():
    assert rank({"a": [1.0, 2.0], "b": [0.0, 1.0]})["p"] is None
    same = rank({name: [1.0, 2.0, 3.0] for name in "abc"})
    assert same["p"] == 1.0
    assert same["cliques"] == [["a", "b", "c"]]
