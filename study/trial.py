"""One trial: purify every victim with one configuration, and score what comes out on `val`.

Plain functions; nothing here knows Ray, Optuna or MLflow.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bimask.config import PurifyConfig
from bimask.errors import NonFiniteError
from bimask.masks import MaskSet, fold
from bimask.metrics import EvalSets, Scores, evaluate
from bimask.purify import Passes, RoundLog, purify
from bimask.victim import Victim
from study.config import StudyConfig

SCORES = ("clean_accuracy", "attack_success", "recovery")


@dataclass(frozen=True)
class Case:
    """What a trial needs of one victim; it holds `val` and never sees `test`.

    Attributes:
        name: of the victim in this study.
        victim: with its own scores.
        clean: the defender's images, (N, C, H, W) float in [0, 1].
        val: evaluation sets to choose on; they know the true trigger (`oracle` selection).
    """

    name: str
    victim: Victim
    clean: Tensor
    val: EvalSets

    @classmethod
    def of(cls, name: str, victim: Victim, config: StudyConfig) -> Case:
        """The case of a victim in a study: its clean subset is drawn from the training split."""
        splits = victim.spec.load_data()
        clean = splits.train.clean_subset(config.clean_images_per_class, seed=config.seed)
        return cls(name, victim, clean.floats(), victim.eval_sets(splits, "val"))


@dataclass(frozen=True)
class CaseResult:
    """What one purification of a trial ended with."""

    scores: Scores
    masks: MaskSet
    rounds: list[RoundLog]
    passes: Passes
    seconds: float


@dataclass(frozen=True)
class TrialResult:
    """Everything a finished trial leaves.

    Attributes:
        cases: victim name -> result.
        scores: mean over the victims of `SCORES`.
        seconds: wall time of the trial.
    """

    cases: dict[str, CaseResult]
    scores: dict[str, float]
    seconds: float

    def record(self) -> dict[str, Any]:
        """The numbers that go into a trial's record, as JSON types."""
        return {
            **self.scores,
            "scores": {name: asdict(case.scores) for name, case in self.cases.items()},
            "passes": {
                "forward": sum(case.passes.forward for case in self.cases.values()),
                "backward": sum(case.passes.backward for case in self.cases.values()),
            },
            "rounds": sum(len(case.rounds) for case in self.cases.values()),
            "seconds": self.seconds,
        }


Report = Callable[[str, RoundLog, Scores], None]


def run_trial(
    config: PurifyConfig,
    cases: list[Case],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    report_every: int = 10,
    on_report: Report | None = None,
) -> TrialResult:
    """Purify each case with one configuration.

    Args:
        config: settings of the defence.
        cases: victims; they are left as they are.
        seed: of the defence; the same seed gives the same result on the same hardware.
        on_report: called with the victim's name, the round and its scores on `val`, every
            `report_every` rounds.

    Raises:
        NonFiniteError: a loss or a score is NaN or infinite. No number is ever made up for it.
    """
    started = time.perf_counter()
    results = {}
    for case in cases:
        model = copy.deepcopy(case.victim.model).to(device)
        val = case.val.to(device)

        def on_round(log: RoundLog, masks: MaskSet) -> None:
            if on_report is not None and (log.step + 1) % report_every == 0:
                on_report(case.name, log, evaluate(fold(model, masks), val))  # noqa: B023

        result = purify(
            model,
            case.clean.to(device),
            config,
            generator=torch.Generator().manual_seed(seed),
            on_round=on_round,
        )
        scores = evaluate(result.model(), val)
        results[case.name] = CaseResult(
            scores, result.masks.cpu(), result.rounds, result.passes, result.seconds
        )
    means = {
        name: sum(getattr(r.scores, name) for r in results.values()) / len(results) for name in SCORES
    }
    for name, value in means.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"The objective {name} is {value}.")
    return TrialResult(results, means, time.perf_counter() - started)


def purified(model: nn.Module, tensors: dict[str, Tensor], config: PurifyConfig) -> nn.Module:
    """The purified model from saved masks."""
    return fold(model, MaskSet.from_tensors(tensors, sharpness=config.sharpness))
