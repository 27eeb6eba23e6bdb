"""Closed forms of what a trial's numbers come to."""

import pytest

from study.spec.objectives import Aggregate, Constraints, mean_of, over_victims, spread, total_violation


def test_mean_worst_and_cvar_of_four_victims():
    rates = [0.1, 0.4, 0.2, 0.3]
    assert Aggregate(rule="mean")("attack_success", rates) == pytest.approx(0.25)
    assert Aggregate(rule="worst")("attack_success", rates) == 0.4
    assert Aggregate(rule="worst")("clean_accuracy", rates) == 0.1
    assert Aggregate(rule="cvar", alpha=0.5)("attack_success", rates) == pytest.approx(0.35)
    assert Aggregate(rule="cvar", alpha=0.5)("clean_accuracy", rates) == pytest.approx(0.15)
    # 1.5 victims: the worst whole, half of the next
    assert Aggregate(rule="cvar", alpha=0.375)("attack_success", rates) == pytest.approx(0.55 / 1.5)


@pytest.mark.parametrize("rates", [[0.3], [0.1, 0.7], [0.9, 0.2, 0.4]])
def test_cvar_lies_between_mean_and_worst_and_ends_in_them(rates):
    def cvar(alpha):
        return Aggregate(rule="cvar", alpha=alpha)("attack_success", rates)

    assert cvar(1) == pytest.approx(sum(rates) / len(rates))
    assert cvar(1 / len(rates)) == cvar(0.01) == pytest.approx(max(rates))
    values = [round(cvar(alpha / 20), 12) for alpha in range(1, 21)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("rule", ["mean", "worst", "cvar"])
def test_risk_is_the_mean_under_every_rule(rule):
    # the second victim's trials all have the higher risk: the worst alone would hide the first's order
    assert Aggregate(rule=rule)("risk", iter([0.2, 0.6])) == pytest.approx(0.4)


def test_a_rule_may_be_given_by_its_name():
    assert Aggregate.model_validate("worst") == Aggregate(rule="worst")


def test_a_victims_runs_count_as_their_mean_and_seconds_as_a_sum():
    runs = {
        "a": [{"attack_success": 0.0}, {"attack_success": 0.4}],
        "b": [{"attack_success": 0.1}, {"attack_success": 0.1}],
    }
    worst = over_victims(Aggregate(rule="worst"), runs, seconds=7.0)
    assert worst == {"attack_success": pytest.approx(0.2), "seconds": 7.0}
    assert over_victims(Aggregate(), runs, seconds=7.0)["attack_success"] == pytest.approx(0.15)


def test_violations_are_signed_and_only_what_is_broken_adds_up():
    bounds = Constraints(max_accuracy_drop=0.02, min_recovery=0.9, max_seconds=10)
    values = {"accuracy_drop": 0.05, "recovery": 0.8, "seconds": 4.0, "attack_success": 1.0}
    found = bounds.violations(values)
    assert found == pytest.approx({"max_accuracy_drop": 0.03, "min_recovery": 0.1, "max_seconds": -6})
    assert total_violation(found) == pytest.approx(0.13)
    assert Constraints().violations(values) == {}
    assert total_violation({}) == 0


def test_spread_and_mean():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "min": 1, "max": 3, "n": 2}
    assert spread([5.0])["std"] == 0
    assert mean_of([{"x": 1.0, "split": "val", "n": 4}, {"x": 2.0, "split": "val", "n": 4}]) == {
        "x": 1.5,
        "split": "val",
        "n": 4,
    }
