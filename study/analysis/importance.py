"""Which settings matter: Optuna's importance of every searched parameter, from a study's records.

The second file that imports optuna: this one reads what a search left, long after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import optuna

from study.spec.directions import Direction
from study.spec.objectives import number
from study.spec.space import CategoricalParameter, IntParameter, Parameter, start_problems
from study.store.schema import TrialRecord

MIN_TRIALS = 10  # with fewer, chance alone decides


def importances(
    space: Mapping[str, Parameter],
    trials: Sequence[TrialRecord],
    objectives: Mapping[str, Direction],
) -> dict[str, dict[str, float]]:
    """Objective -> parameter -> share of the importance, in [0, 1], the largest first.

    fANOVA (Hutter et al. 2014, ICML): the share of the objective's variance over the space that a
    random forest, fitted to the trials, puts down to a parameter. Optuna's default, PED-ANOVA, looks at
    the best tenth alone, which in a study of 40 is four trials. Parameters that exist in some trials
    only (`when`) are left out.

    Args:
        trials: records with `parameters` and the objectives' values, all of them finite; those outside
            the space, as trial 0, are left out.

    Returns:
        No entry for an objective that is the same in all trials; nothing for less than `MIN_TRIALS`
        trials, or where no parameter is in all of them.
    """
    always = [name for name, parameter in space.items() if not parameter.when]
    searched = [
        trial
        for trial in trials
        if set(always) <= set(trial["parameters"]) and not start_problems(space, [trial["parameters"]])
    ]
    if len(searched) < MIN_TRIALS or not always:
        return {}
    known = {name: _distribution(space[name]) for name in always}
    shares = {}
    for objective, direction in objectives.items():
        values = [number(trial, objective) for trial in searched]
        if min(values) == max(values):
            continue
        study = _study(known, searched, values, direction)
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=always)
        shares[objective] = {name: float(share) for name, share in found.items()}
    return shares


def _study(
    known: Mapping[str, optuna.distributions.BaseDistribution],
    trials: Sequence[TrialRecord],
    values: Sequence[float],
    direction: Direction,
) -> optuna.Study:
    """The trials as a study of one objective, in memory."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=direction)
    for trial, value in zip(trials, values, strict=True):
        parameters = {name: trial["parameters"][name] for name in known}
        study.add_trial(
            optuna.trial.create_trial(value=value, params=parameters, distributions=dict(known))
        )
    return study


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    if isinstance(parameter, CategoricalParameter):
        return optuna.distributions.CategoricalDistribution(parameter.choices)
    if isinstance(parameter, IntParameter):
        return optuna.distributions.IntDistribution(parameter.low, parameter.high, log=parameter.log)
    return optuna.distributions.FloatDistribution(parameter.low, parameter.high, log=parameter.log)
