"""A trial is one configuration: every victim is purified with it and scored on `val`.

The trials of a group that may share a run (`Defence.batch_key`) run at once, on one prepared victim,
those of other defences one after another, and each ends with the numbers that it has alone. Plain
functions; nothing here knows Ray, Optuna or MLflow.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Sequence

import torch
from torch import nn

from bimask.defences.settings import DefenceConfig
from bimask.errors import NonFiniteError
from bimask.tasks import defence_of
from study.spec.objectives import numbers_of
from study.trial.cases import Case, CaseResult
from study.trial.checkpoint import Checkpoints, TrialCheckpoint
from study.trial.result import TrialResult
from study.trial.rules import TrialRules
from study.trial.state import Report, TrialObserver, TrialState


def run_trials(
    configs: Sequence[DefenceConfig],
    cases: Sequence[Case],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    report_every: int = 10,
    on_report: Report | None = None,
    rules: TrialRules | None = None,
    repeats: Sequence[int] | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[TrialResult | NonFiniteError]:
    """Purify each case with every configuration, all configurations at once.

    Args:
        configs: settings, one a trial; their types name the defences, which may differ.
        cases: runs of victims, in the order in which a trial meets them; they are left as they are.
        seed: of the defence in a victim's first run, the same for every trial; the same seed gives the
            same result on the same hardware, whatever else is in the group.
        on_report: called with the trial's position, the run, the round and its scores on `val`, every
            `report_every` rounds.
        rules: what the numbers come to and when a trial is stopped; by default the mean, and never.
        repeats: of each trial, how many runs a victim it has at most; None is all that are in `cases`.
        checkpoints: where the trials' states are kept, and gone on from if they are there.

    Returns:
        One result a configuration, or the error that ended this one alone: a loss or an objective is
        NaN or infinite. No number is ever made up for it.
    """
    rules = rules or TrialRules()
    trials = [TrialState(position, config) for position, config in enumerate(configs)]

    def mine(trial: TrialState) -> list[Case]:
        """The runs that the trial has."""
        most = None if repeats is None else repeats[trial.position]
        return [case for case in cases if most is None or case.repeat < most]

    runs = {trial.position: mine(trial) for trial in trials}
    keys = {position: {case.key for case in found} for position, found in runs.items()}
    for case in cases:
        model = copy.deepcopy(case.victim.model).to(device)
        there = case.to(device)
        for group in _batches(trials):
            running = [t for t in group if t.running and case.key in keys[t.position]]
            if running:
                asked = [len(runs[trial.position]) for trial in running]
                watch = TrialObserver(there, model, running, rules, report_every, on_report, asked)
                key = f"{case.key}.{group[0].position}"
                kept = None if checkpoints is None else checkpoints.place(key)
                _defend(there, model, running, seed=seed, watch=watch, kept=kept)
        for trial in trials:
            if trial.running and case.key in keys[trial.position]:
                trial.stopped = rules.between(runs[trial.position], trial.numbers, trial.seconds)
    return [_result(trial, runs[trial.position], rules) for trial in trials]


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


def _batches(trials: Sequence[TrialState]) -> list[list[TrialState]]:
    """The trials that may share one run: of one defence, and of one key there."""
    groups: dict[tuple[str, Hashable], list[TrialState]] = {}
    for trial in trials:
        defence = defence_of(trial.config)
        groups.setdefault((defence.name, defence.batch_key(trial.config)), []).append(trial)
    return list(groups.values())


def _defend(
    case: Case,
    model: nn.Module,
    running: list[TrialState],
    *,
    seed: int,
    watch: TrialObserver,
    kept: TrialCheckpoint | None,
) -> None:
    """One run of trials that share one; every one of them gets its result, or its error."""
    configs = [trial.config for trial in running]
    defence = defence_of(configs[0])
    if kept is not None:
        watch.resume(kept)
    ended = defence.run(
        model,
        case.data(defence),
        configs,
        generators=[torch.Generator().manual_seed(seed + case.repeat) for _ in running],
        prepared=case.prepared.get(defence.name),
        on_step=watch,
        state=None if kept is None else kept.state(configs),
        between_steps=None if kept is None else kept.between_steps,
    )
    if kept is not None:
        kept.keep()
    for trial, result in zip(running, ended, strict=True):
        if isinstance(result, NonFiniteError):
            trial.failure = result
        elif trial.running:
            scores = case.task.evaluate(result.model(), case.val)
            said = case.ask(model, result)
            own = watch.rules.numbers(result.numbers)
            trial.cases[case.key] = CaseResult(
                case.name,
                scores,
                result,
                {name: t.detach().cpu().contiguous() for name, t in result.tensors.items()},
                numbers_of(case.task, scores, own, before=case.before, said=said),
                said,
            )
    seconds = watch.seconds_each
    for trial in running:
        trial.seconds += seconds
