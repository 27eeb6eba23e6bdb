"""A trial is one configuration: every victim is purified with it and scored on `val`.

The trials of a group run at once, on one prepared victim (`bimask.population`), and each ends with the
numbers that it has alone. Plain functions; nothing here knows Ray, Optuna or MLflow.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bimask.config import ENGINE, PurifyConfig
from bimask.errors import NonFiniteError
from bimask.evidence import Probe
from bimask.masks import MaskSet, fold
from bimask.metrics import CleanScores, CleanSet, EvalSets, Scores, evaluate
from bimask.population import PopulationPurifier
from bimask.result import Passes, RoundLog
from bimask.trigger_pool import TriggerPool
from study.checkpoint import Checkpoints, Place
from study.config import StudyConfig
from study.judge import Judge
from study.objectives import known_scores, mean_of, numbers_of
from study.standing import Report, Standing, Watch
from study.suspect import Subject


@dataclass(frozen=True)
class Case:
    """What a trial needs of one victim; it holds `val` and never sees `test`.

    Attributes:
        name: of the victim in this study.
        victim: with its own scores; or a suspect.
        clean: the defender's images, (N, C, H, W) float in [0, 1].
        val: evaluation sets to choose on; they know the true trigger (`oracle` selection), but for a
            suspect, of which nobody does.
        repeat: which of the victim's runs in a trial this is: each has its own seed and images.
        probe: what asks a purified model without the attack, see `study.blind`; None asks nothing.
        pool: the triggers that `class_triggers` are drawn from; None where no trial has any.
    """

    name: str
    victim: Subject
    clean: Tensor
    val: EvalSets | CleanSet
    repeat: int = 0
    probe: Probe | None = None
    pool: TriggerPool | None = None

    @classmethod
    def of(cls, name: str, victim: Subject, config: StudyConfig, repeat: int = 0) -> Case:
        """The case of a victim in a study: its clean subset is drawn from the training split."""
        splits = victim.load_data()
        seed = config.seed + repeat
        clean = splits.train.clean_subset(config.clean_images_per_class, seed=seed)
        return cls(name, victim, clean.floats(), victim.eval_sets(splits, "val"), repeat)

    def to(self, device: torch.device | str) -> Case:
        """The same with its images on another device; the victim stays."""
        probe = None if self.probe is None else self.probe.to(device)
        pool = None if self.pool is None else self.pool.to(device)
        clean, val = self.clean.to(device), self.val.to(device)
        return replace(self, clean=clean, val=val, probe=probe, pool=pool)

    def ask(self, model: nn.Module, masks: MaskSet) -> dict[str, float]:
        """What the probe says of the model under its masks, by name; nothing where there is none."""
        if self.probe is None:
            return {}
        return self.probe(fold(model, masks), fold(model, masks, inverse=True)).numbers()

    @property
    def before(self) -> float:
        """The victim's own clean accuracy on `val`."""
        return self.victim.scores["val"].clean_accuracy

    @property
    def key(self) -> str:
        """Names the run: the victim's name, and from the second run on which one it is."""
        return self.name if self.repeat == 0 else f"{self.name}.{self.repeat}"


@dataclass(frozen=True)
class CaseResult:
    """What one purification of a trial ended with.

    Attributes:
        name: of the victim.
        numbers: what objectives and constraints are made of, see `numbers_of`.
        evidence: what the case's probe says of the purified model, by name.
    """

    name: str
    scores: Scores | CleanScores
    masks: MaskSet
    rounds: list[RoundLog]
    passes: Passes
    numbers: dict[str, float]
    evidence: dict[str, float] = field(default_factory=dict)

    def everything(self) -> dict[str, Any]:
        """Scores, numbers and evidence under their names."""
        return asdict(self.scores) | self.numbers | self.evidence


@dataclass(frozen=True)
class TrialResult:
    """Everything that a trial leaves, also one that was stopped.

    Attributes:
        cases: run -> result, of the runs that ended.
        values: objective -> value over all victims; empty for a stopped trial.
        spread: objective -> its spread over the repeats; empty for a single one.
        rungs: place where the trial was looked at -> its losses there.
        seconds: of the trial; where several ran at once, an even share of their wall time.
        stopped: why the trial was stopped early, or None.
    """

    cases: dict[str, CaseResult]
    values: dict[str, float]
    spread: dict[str, dict[str, float]]
    rungs: dict[str, list[float]]
    seconds: float
    stopped: str | None = None

    @property
    def scores(self) -> dict[str, float]:
        """`SCORES` over all victims, as far as they are known."""
        return known_scores(self.values)

    def record(self) -> dict[str, Any]:
        """The numbers that go into a trial's record, as JSON types."""
        cases = self.cases.values()
        record = {
            **self.values,
            "scores": self.per_victim(),
            "passes": {
                "forward": sum(case.passes.forward for case in cases),
                "backward": sum(case.passes.backward for case in cases),
            },
            "rounds": sum(len(case.rounds) for case in cases),
            "seconds": self.seconds,
        }
        if self.rungs:
            record["rungs"] = self.rungs
        if self.stopped is not None:
            record["stopped"] = self.stopped
        if self.spread:
            record["spread"] = self.spread
            record["runs"] = {key: case.everything() for key, case in self.cases.items()}
        return record

    def per_victim(self) -> dict[str, dict[str, Any]]:
        """Victim -> its scores, numbers and evidence, the mean where it had several runs."""
        runs: dict[str, list[dict[str, Any]]] = {}
        for case in self.cases.values():
            runs.setdefault(case.name, []).append(case.everything())
        return {name: mean_of(mine) for name, mine in runs.items()}


def run_trials(
    configs: Sequence[PurifyConfig],
    cases: Sequence[Case],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    report_every: int = 10,
    on_report: Report | None = None,
    judge: Judge | None = None,
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
    judge = judge or Judge()
    trials = [Standing(position, config) for position, config in enumerate(configs)]
    for case in cases:
        model = copy.deepcopy(case.victim.model).to(device)
        there = case.to(device)
        for group in _populations(trials):
            if running := [trial for trial in group if trial.running]:
                watch = Watch(there, model, running, judge, report_every, on_report)
                key = f"{case.key}.{group[0].position}"
                kept = None if checkpoints is None else checkpoints.place(key)
                _purify(there, model, running, seed=seed, watch=watch, kept=kept)
        for trial in trials:
            if trial.running:
                trial.stopped = judge.between(cases, trial.numbers, trial.seconds)
    return [_result(trial, cases, judge) for trial in trials]


def _result(trial: Standing, cases: Sequence[Case], judge: Judge) -> TrialResult | NonFiniteError:
    """What a trial ended with; the error where an objective is not finite."""
    if trial.failure is not None:
        return trial.failure
    if trial.stopped is not None:
        return TrialResult(trial.cases, {}, {}, trial.rungs, trial.seconds, trial.stopped)
    values = judge.values(cases, trial.numbers, trial.seconds)
    for name, value in values.items():
        if not math.isfinite(value):
            return NonFiniteError(f"The objective {name} is {value}.")
    spreads = judge.spreads(cases, trial.numbers)
    return TrialResult(trial.cases, values, spreads, trial.rungs, trial.seconds)


def _populations(trials: Sequence[Standing]) -> list[list[Standing]]:
    """The trials that can share one prepared net, as `ENGINE` says."""
    groups: dict[tuple[object, ...], list[Standing]] = {}
    for trial in trials:
        groups.setdefault(tuple(getattr(trial.config, name) for name in ENGINE), []).append(trial)
    return list(groups.values())


def _purify(
    case: Case,
    model: nn.Module,
    running: list[Standing],
    *,
    seed: int,
    watch: Watch,
    kept: Place | None,
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
        watch.go_on(kept)
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
