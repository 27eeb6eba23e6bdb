"""A trial is one configuration: every victim is purified with it and scored on `val`.

The trials of a group run at once, on one prepared victim (`bimask.defences.ims.population`), and each
ends with the numbers that it has alone. Plain functions; nothing here knows Ray, Optuna or MLflow.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bimask.defences.ims.config import ENGINE, PurifyConfig
from bimask.defences.ims.population import PopulationPurifier
from bimask.errors import NonFiniteError
from bimask.masking.masks import MaskSet, fold
from bimask.metrics import evaluate
from study.spec.objectives import numbers_of
from study.trial.cases import Case, CaseResult
from study.trial.checkpoint import Checkpoints, TrialCheckpoint
from study.trial.result import TrialResult
from study.trial.rules import TrialRules
from study.trial.state import Report, TrialObserver, TrialState


def run_trials(
    configs: Sequence[PurifyConfig],
    cases: Sequence[Case],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    report_every: int = 10,
    on_report: Report | None = None,
    rules: TrialRules | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[TrialResult | NonFiniteError]:
    """Purify each case with every configuration, all configurations at once.

    Args:
        configs: settings of the defence, one a trial.
        cases: runs of victims, in the order in which a trial meets them; they are left as they are.
        seed: of the defence in a victim's first run, the same for every trial; the same seed gives the
            same result on the same hardware, whatever else is in the group.
        on_report: called with the trial's position, the run, the round and its scores on `val`, every
            `report_every` rounds.
        judge: what the numbers come to and when a trial is stopped; by default the mean, and never.
        checkpoints: where the trials' states are kept, and gone on from if they are there.

    Returns:
        One result a configuration, or the error that ended this one alone: a loss or an objective is
        NaN or infinite. No number is ever made up for it.
    """
    rules = rules or TrialRules()
    trials = [TrialState(position, config) for position, config in enumerate(configs)]
    for case in cases:
        model = copy.deepcopy(case.victim.model).to(device)
        there = case.to(device)
        for group in _populations(trials):
            if running := [trial for trial in group if trial.running]:
                watch = TrialObserver(there, model, running, rules, report_every, on_report)
                key = f"{case.key}.{group[0].position}"
                kept = None if checkpoints is None else checkpoints.place(key)
                _purify(there, model, running, seed=seed, watch=watch, kept=kept)
        for trial in trials:
            if trial.running:
                trial.stopped = rules.between(cases, trial.numbers, trial.seconds)
    return [_result(trial, cases, rules) for trial in trials]


def _result(
    trial: TrialState, cases: Sequence[Case], rules: TrialRules
) -> TrialResult | NonFiniteError:
    """What a trial ended with; the error where an objective is not finite."""
    if trial.failure is not None:
        return trial.failure
    if trial.stopped is not None:
        return TrialResult(trial.cases, {}, {}, trial.rungs, trial.seconds, trial.stopped)
    values = rules.values(cases, trial.numbers, trial.seconds)
    for name, value in values.items():
        if not math.isfinite(value):
            return NonFiniteError(f"The objective {name} is {value}.")
    spreads = rules.spreads(cases, trial.numbers)
    return TrialResult(trial.cases, values, spreads, trial.rungs, trial.seconds)


def _populations(trials: Sequence[TrialState]) -> list[list[TrialState]]:
    """The trials that can share one prepared net, as `ENGINE` says."""
    groups: dict[tuple[object, ...], list[TrialState]] = {}
    for trial in trials:
        groups.setdefault(tuple(getattr(trial.config, name) for name in ENGINE), []).append(trial)
    return list(groups.values())


def _purify(
    case: Case,
    model: nn.Module,
    running: list[TrialState],
    *,
    seed: int,
    watch: TrialObserver,
    kept: TrialCheckpoint | None,
) -> None:
    """One run of trials that share a net; every one of them gets its result, or its error."""
    population = PopulationPurifier(
        model,
        case.clean,
        [trial.config for trial in running],
        generators=[torch.Generator().manual_seed(seed + case.repeat) for _ in running],
        pool=case.pool,
        on_round=watch,
    )
    if kept is not None:
        watch.resume(kept)
    ended = population.run() if kept is None else kept.run(population)
    for trial, result in zip(running, ended, strict=True):
        if isinstance(result, NonFiniteError):
            trial.failure = result
        elif trial.running:
            scores, said = evaluate(result.model(), case.val), case.ask(model, result.masks)
            masks = result.masks.cpu()
            trial.cases[case.key] = CaseResult(
                case.name,
                scores,
                masks,
                result.rounds,
                result.passes,
                numbers_of(scores, masks, before=case.before, said=said),
                said,
            )
    seconds = watch.seconds_each + (kept.seconds / len(running) if kept is not None else 0.0)
    for trial in running:
        trial.seconds += seconds


def purified(
    model: nn.Module, tensors: dict[str, Tensor], config: PurifyConfig, *, inverse: bool = False
) -> nn.Module:
    """The purified model from saved masks, or its inverse twin."""
    masks = MaskSet.from_tensors(
        tensors, sharpness=config.sharpness, straight_through=config.straight_through
    )
    return fold(model, masks, inverse=inverse)
