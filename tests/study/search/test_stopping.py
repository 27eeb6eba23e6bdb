"""Ranks, lines to beat and verdicts, against brute force."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from bimask.defences.ims.config import PurifyConfig
from study.analysis.pareto import choose, dominated, feasible_first, losses, ranks
from study.spec.objectives import Aggregate, Constraints
from study.spec.stopping import EarlyStopping, Halving
from study.trial.history import ParetoHistory, StoppingBounds, line_to_beat
from study.trial.rules import TrialRules


def brute_force_ranks(values):
    """The longest chain of rows that dominate one another above each row."""

    found = {}
    for i in np.argsort(values.sum(1), kind="stable"):  # whoever dominates has the smaller sum
        row = values[i]
        above = [found[j] for j in found if (values[j] <= row).all() and (values[j] < row).any()]
        found[i] = 1 + max(above, default=-1)
    return [found[i] for i in range(len(values))]


@pytest.mark.parametrize("objectives", [2, 3])
def test_ranks_are_longest_chains(objectives):
    rng = np.random.default_rng(0)
    for n in range(1, 20):
        values = rng.integers(0, 4, (n, objectives)).astype(float)
        assert ranks(values).tolist() == brute_force_ranks(values)


@pytest.mark.parametrize("reduction", [1.5, 2, 3, 10])
def test_who_is_behind_the_line_is_who_is_not_among_the_first(reduction):
    """The rank of a newcomer among all, by sorting all of them, decides the same."""
    rng = np.random.default_rng(1)
    for n in range(1, 25):
        values = rng.integers(0, 6, (n, 2)).astype(float)
        line = line_to_beat(values, reduction)
        for newcomer in rng.integers(0, 6, (10, 2)).astype(float):
            everyone = np.vstack([values, newcomer])
            mine = brute_force_ranks(everyone)[-1]
            better = sum(rank < mine for rank in brute_force_ranks(values))
            among_first = better < math.ceil((n + 1) / reduction)
            assert dominated(newcomer, line) == (not among_first)


def test_nobody_of_the_front_is_ever_behind():
    values = np.random.default_rng(2).random((60, 2))
    for reduction in (1.1, 2, 4, 60):
        line = line_to_beat(values, reduction)
        for row in values[ranks(values) == 0]:
            assert not dominated(row, line)


def test_feasible_points_come_first_and_else_the_nearest():
    assert feasible_first([0.2, 0.0, 0.0, 0.1]) == [1, 2]
    assert feasible_first([0.2, 0.1, 0.1, 0.3]) == [1, 2]
    assert feasible_first([]) == []
    points = [{"clean_accuracy": 0.9, "attack_success": 0.1 * i} for i in range(3)]
    assert choose(points, min_clean_accuracy=0, violations=[0.1, 0, 0]) == 1
    assert choose(points, min_clean_accuracy=0, violations=[0.1, 0.1, 0.2]) is None


RUNS = [SimpleNamespace(key=name, name=name, before=0.99) for name in ("a", "b", "c")]


def numbers(accuracy, success):
    return {
        "clean_accuracy": accuracy,
        "attack_success": success,
        "recovery": 0.5,
        "pruned_share": 0.1,
        "accuracy_drop": 0.99 - accuracy,
    }


def rules(rule, front, **constraints):
    rivals = StoppingBounds(front=[[-accuracy, success] for accuracy, success in front])
    aggregate, bounds = Aggregate.model_validate(rule), Constraints(**constraints)
    return TrialRules(
        aggregate=aggregate, constraints=bounds, early_stopping=EarlyStopping(), rivals=rivals
    )


def test_a_trial_is_stopped_once_no_victim_left_can_save_it():
    done = {"a": numbers(0.90, 0.6)}
    assert "dominated" in rules("worst", [(0.95, 0.5)]).between(RUNS, done, 1.0)
    assert rules("worst", [(0.95, 0.61)]).between(RUNS, done, 1.0) is None, "its success may be less"
    # the mean may still become (0.9 + 2) / 3 and 0.2
    assert rules("mean", [(0.95, 0.1)]).between(RUNS, done, 1.0) is None
    assert rules("mean", [(0.97, 0.1)]).between(RUNS, done, 1.0) is not None
    assert rules("worst", []).between(RUNS, done, 1.0) is None, "there is nobody yet"
    everything = {run.key: numbers(0.1, 1.0) for run in RUNS}
    assert rules("worst", [(0.95, 0.5)]).between(RUNS, everything, 1.0) is None, "it has ended"


def test_a_bound_that_is_broken_for_good_stops_a_trial_only_where_another_holds_it():
    done = {"a": numbers(0.90, 0.0)}
    assert "max_accuracy_drop" in rules("worst", [(0.98, 0.5)], max_accuracy_drop=0.05).between(
        RUNS, done, 1.0
    )
    assert rules("worst", [], max_accuracy_drop=0.05).between(RUNS, done, 1.0) is None
    assert rules("mean", [(0.98, 0.5)], max_accuracy_drop=0.05).between(RUNS, done, 1.0) is None


@pytest.mark.parametrize("rule", ["mean", "worst", {"rule": "cvar", "alpha": 0.5}])
def test_what_is_stopped_between_victims_is_dominated_whatever_the_others_give(rule):
    """Stopped is exactly what every completion on a grid leaves dominated by the front."""
    rng = np.random.default_rng(3)
    stopped = 0
    for _ in range(60):
        front = [(0.9 + 0.1 * rng.random(), 0.6 * rng.random())]
        decide = rules(rule, front)
        done = {"a": numbers(0.8 + 0.2 * rng.random(), rng.random())}
        verdict = decide.between(RUNS, done, 1.0)
        stopped += verdict is not None
        grid = [numbers(acc, asr) for acc, asr in itertools.product((0.5, 1.0), (0.0, 1.0))]
        fates = [
            decide.losses(decide.values(RUNS, done | {"b": b, "c": c}, 1.0))
            for b, c in itertools.product(grid, grid)
        ]
        beaten = [dominated(np.array(fate), np.array(decide.rivals.front)) for fate in fates]
        assert all(beaten) == (verdict is not None)
    assert 0 < stopped < 60


def test_rungs_are_shares_of_a_trials_own_rounds():
    rules = EarlyStopping(halving=Halving(shares=[0.5, 0.75]))
    settings = PurifyConfig(initialise_rounds=3, minimise_rounds=3, select_rounds=5)
    assert TrialRules(early_stopping=rules).rungs(settings, 30) == {6: 0.5, 9: 0.75}
    assert TrialRules().rungs(settings, 30) == {}
    one = PurifyConfig(initialise_rounds=0, minimise_rounds=0, select_rounds=1)
    assert TrialRules(early_stopping=rules).rungs(one, 30) == {}, "the last round is the end, no rung"


def test_a_rung_stops_nobody_before_its_grace():
    standings = ParetoHistory(EarlyStopping(halving=Halving(grace=3, reduction=2)))
    for success in (0.1, 0.2):
        standings.passed("a@0.5", [-0.9, success])
    assert standings.rivals().lines == {}
    standings.passed("a@0.5", [-0.9, 0.3])
    decide = TrialRules(early_stopping=standings.rules, rivals=standings.rivals())
    assert decide.at_rung(RUNS[0], 0.5, numbers(0.9, 0.15), PurifyConfig()) is None
    assert "behind at 0.5" in decide.at_rung(RUNS[0], 0.5, numbers(0.9, 0.25), PurifyConfig())
    assert decide.at_rung(RUNS[1], 0.5, numbers(0.0, 1.0), PurifyConfig()) is None, (
        "another victim's rung"
    )


def test_only_feasible_trials_are_rivals():
    standings = ParetoHistory(EarlyStopping())
    standings.finished([-0.9, 0.1], {"max_accuracy_drop": 0.01})
    assert standings.rivals().front == []
    standings.finished([-0.95, 0.3], {"max_accuracy_drop": 0.0})
    standings.finished([-0.96, 0.2], {})
    assert standings.rivals().front == [[-0.96, 0.2]]
    assert losses([numbers(0.96, 0.2)], TrialRules().directions).tolist() == [[-0.96, 0.2]]
