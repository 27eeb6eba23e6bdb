"""Which of Optuna's samplers copes with a space whose first parameter says which others exist.

    python -m benchmarks.conditional --seeds 20     # some minutes; `gp` is the slow one

A synthetic problem in the place of a study of several defences: `defence` is one of eight, each has two
to five settings of its own and two losses, both to be low. The first setting trades one loss for the
other; the further ones have a best value each, from which both losses rise. Defences differ in how good
their best is, and the front of the whole problem is made of two of them. Values are seen with noise,
and the hypervolume is of the values without noise. A seed is another problem and another search. As in
a study, the search begins with one point of each defence.
"""

from __future__ import annotations

import argparse
import itertools
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import torch

from benchmarks import report
from benchmarks.pages.conditional import AT, KEPT
from benchmarks.purify import hardware
from study.analysis.pareto import hypervolume

DEFENCES, NOISE = 8, 0.01
REFERENCE = np.array(
    [0.5, 1.0]
)  # of the digits studies: half of the accuracy lost, every trigger obeyed


def tpe(startup: int, **more: Any) -> Callable[[int], optuna.samplers.BaseSampler]:
    """TPE that draws its first `startup` trials at random."""
    return lambda seed: optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=startup, constant_liar=True, **more
    )


WAYS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe, startup 6": tpe(6),
    "tpe, startup 16": tpe(16),
    "tpe, grouped, startup 6": tpe(6, multivariate=True, group=True),
    "tpe, grouped, startup 16": tpe(16, multivariate=True, group=True),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
    "qmc": lambda seed: optuna.samplers.QMCSampler(
        seed=seed, scramble=True, warn_independent_sampling=False
    ),
    "gp": lambda seed: optuna.samplers.GPSampler(
        seed=seed, n_startup_trials=6, warn_independent_sampling=False
    ),
}


@dataclass(frozen=True)
class Problem:
    """Eight defences: of each the best values of its settings but the first, and what its best
    costs."""

    best: list[list[float]]
    floor: list[tuple[float, float]]

    @classmethod
    def of(cls, seed: int) -> Problem:
        """A problem of its own for every seed."""
        draw = np.random.default_rng(seed)
        best = [draw.uniform(0.1, 0.9, draw.integers(1, 5)).tolist() for _ in range(DEFENCES)]
        floor = [tuple(draw.uniform([0.04, 0.1], [0.2, 0.5])) for _ in range(DEFENCES)]
        first, second = draw.choice(DEFENCES, 2, replace=False)
        floor[first], floor[second] = (0.0, 0.03), (0.03, 0.0)  # accurate, and thorough
        return cls(best, floor)

    def losses(self, trial: optuna.Trial) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Accuracy lost and attack success of a trial, without noise."""
        number = int(str(trial.suggest_categorical("defence", NAMES)).removeprefix("d"))
        strength = trial.suggest_float(f"d{number}.strength", 0, 1)
        away = sum(
            (trial.suggest_float(f"d{number}.s{i}", 0, 1) - best) ** 2
            for i, best in enumerate(self.best[number])
        )
        lost, left = self.floor[number]
        damage = 1 - np.exp(-4 * away)
        return np.array(
            [
                lost + 0.1 * strength**2 + 0.2 * damage,
                left + (1 - left) * max((1 - strength) ** 3, damage),
            ]
        )


NAMES = [f"d{number}" for number in range(DEFENCES)]


def search(way: str, seed: int) -> list[float]:
    """The hypervolume after each number of trials in `AT`."""
    problem, noise = Problem.of(seed), np.random.default_rng(1000 + seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=WAYS[way](seed))
    for name in NAMES:
        study.enqueue_trial({"defence": name})
    rows, volumes = [], []
    for count in range(1, max(AT) + 1):
        trial = study.ask()
        rows.append(problem.losses(trial))
        study.tell(trial, list(rows[-1] + NOISE * noise.standard_normal(2)))
        if count in AT:
            volumes.append(hypervolume(np.array(rows), REFERENCE))
    return volumes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conditional", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {"ways": {}}
    for seed, way in itertools.product(range(options.seeds), options.ways):
        seeds = kept["ways"].setdefault(way, {})
        if str(seed) not in seeds:
            seeds[str(seed)] = search(way, seed)
            kept["about"] = hardware(torch.device("cpu"))
            KEPT.parent.mkdir(parents=True, exist_ok=True)
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    report.write()


if __name__ == "__main__":
    main()
