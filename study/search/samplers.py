"""Optuna's samplers by name, and which of them `auto` is."""

from __future__ import annotations

from collections.abc import Callable

import optuna

from study.spec.config import StudyConfig

STARTUP = 6  # finished trials that a model is first made of; until then points are random
WORTH = 5.0  # seconds of a trial from which on `auto` spends the second or two of GP's suggestion
MANY = 250  # trials from which on GP's suggestions take too long
LONG = 1000  # trials from which on TPE looks through them once a trial, no longer once a setting

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


def joint_tpe(seed: int, *, conditions: bool) -> optuna.samplers.BaseSampler:
    """TPE that draws all settings at once: of several defences those of each are learned from its own
    trials (benchmarks/conditional.md), and a suggestion on a long history costs a quarter.

    Args:
        conditions: whether some trials lack settings that others have. Which settings come together is
            then looked for in all trials, every time.
    """
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=STARTUP, constant_liar=True, multivariate=True, group=conditions
    )


def sampler_of(config: StudyConfig, seed: int) -> optuna.samplers.BaseSampler:
    """What a study begins with, itself."""
    name, conditions = first_sampler(config), _has_conditions(config)
    joint = name == "tpe" and (config.defenders.several or config.trials > LONG)
    return joint_tpe(seed, conditions=conditions) if joint else SAMPLERS[name](seed)


def first_sampler(config: StudyConfig) -> str:
    """What a study begins with: under `auto` GP, where that can learn the whole space in time."""
    if config.sampler != "auto":
        return config.sampler
    return "tpe" if _has_conditions(config) or config.trials > MANY else "gp"


def _has_conditions(config: StudyConfig) -> bool:
    return any(parameter.when for parameter in config.space.values())
