"""Optuna's samplers by name, and which of them `auto` is."""

from __future__ import annotations

from collections.abc import Callable

import optuna

from study.spec.config import StudyConfig

STARTUP = 6  # finished trials that a model is first made of; until then points are random
WORTH = 5.0  # seconds of a trial from which on `auto` spends the second or two of GP's suggestion
MANY = 250  # trials from which on GP's suggestions take too long

# A population of 20 and not of Optuna's 50: a study of 100 trials has then some generations.
SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=STARTUP, constant_liar=True
    ),
    "gp": lambda seed: optuna.samplers.GPSampler(
        seed=seed, n_startup_trials=STARTUP, warn_independent_sampling=False
    ),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed, population_size=20),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "qmc": lambda seed: optuna.samplers.QMCSampler(
        seed=seed, scramble=True, warn_independent_sampling=False
    ),
}


def grouped_tpe(seed: int) -> optuna.samplers.BaseSampler:
    """TPE for several defences: the settings of each are learned together, from its own trials
    (benchmarks/conditional.md)."""
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=STARTUP, constant_liar=True, multivariate=True, group=True
    )


def sampler_of(config: StudyConfig, seed: int) -> optuna.samplers.BaseSampler:
    """What a study begins with, itself."""
    name = first_sampler(config)
    made = grouped_tpe if name == "tpe" and config.defenders.several else SAMPLERS[name]
    return made(seed)


def first_sampler(config: StudyConfig) -> str:
    """What a study begins with: under `auto` GP, where that can learn the whole space in time."""
    if config.sampler != "auto":
        return config.sampler
    conditions = any(parameter.when for parameter in config.space.values())
    return "tpe" if conditions or config.trials > MANY else "gp"
