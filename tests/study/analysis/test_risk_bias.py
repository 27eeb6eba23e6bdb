import pytest

from study.analysis.risk_bias import risk_bias


def trials(pairs, status="COMPLETE"):
    return [{"status": status, "risk": risk, "attack_success": asr} for risk, asr in pairs]


LEVELS = [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_defence_that_risk_flatters_stands_above_the_others():
    honest = [(r, r) for r in LEVELS]
    flattered = [(r, min(1.0, r + 0.4)) for r in LEVELS]
    found = risk_bias({"a": trials(honest), "b": trials(honest), "ims": trials(flattered)})
    assert found["ims"]["bias"] > 0.15 > 0 > found["a"]["bias"] == found["b"]["bias"]
    assert found["ims"]["spearman"] > 0.9
    # each weighs the same, so the biases of all sum up to 0
    assert sum(one["bias"] for one in found.values()) == pytest.approx(0, abs=1e-9)


def test_many_trials_of_one_defence_weigh_no_more_than_few_of_another():
    few, many = [(r, r) for r in LEVELS], [(r, min(1.0, r + 0.4)) for r in LEVELS] * 20
    once = risk_bias({"a": trials(few), "b": trials(many[:5])})
    often = risk_bias({"a": trials(few), "b": trials(many)})
    assert often["a"]["bias"] == pytest.approx(once["a"]["bias"])


def test_what_says_nothing_is_left_out():
    no_risk = [{"status": "COMPLETE", "risk": None, "attack_success": 0.1}] * 5
    cut = trials([(r, r) for r in LEVELS], status="PRUNED")
    two = trials([(0.1, 0.1), (0.2, 0.2)])
    assert risk_bias({"a": no_risk, "b": cut, "c": two, "d": trials([(r, r) for r in LEVELS])}) == {}


def test_a_risk_that_does_not_vary_has_no_rank_correlation():
    same = trials([(0.5, asr) for asr in LEVELS])
    found = risk_bias({"a": same, "b": trials([(r, r) for r in LEVELS])})
    assert found["a"]["spearman"] is None
