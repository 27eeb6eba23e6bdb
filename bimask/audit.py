"""Is this model backdoored, and towards which class? From the model and clean images alone.

Every class k is given how much cheaper it is to reach than the others are, one number a kind of
evidence:

    e_k = log(median of the other classes' prices / price_k)

with the prices of all families of triggers (`bimask.class_triggers`) and the latent distance
(`bimask.latent`). A logistic regression turns the numbers of a class into a score; the highest score is
the model's and its class the suspected target; Platt's sigmoid (1999) turns that into a probability.
Both were fitted on models of known kind, clean and backdoored, whose description is in `CALIBRATION`
beside the coefficients. The probability means what it says for models like those; for others it is a
lead.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bimask.class_triggers import ClassTriggers, Family, find_class_triggers, steps_of
from bimask.errors import DataError
from bimask.latent import latent_distances

CALIBRATION = "audit_calibration.json"
SEARCHED: tuple[Family, ...] = ("patch", "pattern", "warp", "tone")
FLAGGED = 0.5  # probability from which a model is called backdoored
MIN_CLASSES = 4  # with fewer there is no median of others to speak of

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        probability: that the model is backdoored, if it is like those of the calibration and half
            of such models are; in [0, 1].
        target: the suspected class, whatever the probability.
        scores: (K,) of every class; the highest is the target's.
        evidence: kind -> (K,) e_k, of `prices`.
        prices: kind -> (K,): prices of the triggers' families, and "latent".
        triggers: of every family in `SEARCHED`.
    """

    probability: float
    target: int
    scores: Floats
    evidence: dict[str, Floats]
    prices: dict[str, Floats]
    triggers: dict[Family, ClassTriggers]

    @property
    def flagged(self) -> bool:
        return self.probability >= FLAGGED


def audit(model: nn.Module, images: Tensor, *, on_step: Callable[[], None] | None = None) -> Audit:
    """Look for a backdoor in `model`; the same call gives the same answer.

    Args:
        model: images in [0, 1] -> logits (N, K), in eval mode, whose last layer is an nn.Linear;
            left as it is.
        images: (N, C, H, W) in [0, 1], clean, of the model's device; labels are not needed. A few of
            every class are enough, and the model should not have been trained on them.
        on_step: called after each of `steps(K, N)` steps.

    Raises:
        DataError: no images, or images that the model all gives the same class.
        SettingError: fewer than four classes, or the last layer is no nn.Linear.
    """
    prices, triggers = prices_of(model, images, on_step=on_step)
    evidence = {kind: advantage(values) for kind, values in prices.items()}
    fitted = calibration()
    scores = fitted["intercept"] + sum(
        weight * evidence[kind] for kind, weight in fitted["coefficients"].items()
    )
    target = int(np.argmax(scores))
    slope, offset = fitted["platt"]["slope"], fitted["platt"]["offset"]
    probability = 1 / (1 + np.exp(-(slope * scores[target] + offset)))
    return Audit(float(probability), target, scores, evidence, prices, triggers)


def steps(classes: int, images: int) -> int:
    """How often `on_step` is called."""
    return sum(steps_of(family, classes, images) for family in SEARCHED)


def prices_of(
    model: nn.Module, images: Tensor, *, on_step: Callable[[], None] | None = None
) -> tuple[dict[str, Floats], dict[Family, ClassTriggers]]:
    """What each class costs by every kind of evidence, and the triggers behind it; raises what `audit`
    does."""
    distances = latent_distances(model, images)
    if len(distances) < MIN_CLASSES:
        raise DataError(
            f"An audit compares classes, and a model of {len(distances)} has too few; {MIN_CLASSES} "
            "are needed."
        )
    with torch.no_grad():
        answers = model(images).argmax(1)
    if len(answers.unique()) < 2:
        raise DataError(
            f"The model gives all {len(images)} clean images the class {int(answers[0])}; give images "
            "of several classes, in [0, 1], of the size that the model takes."
        )
    triggers = {
        family: find_class_triggers(model, images, family, on_step=on_step) for family in SEARCHED
    }
    prices = {str(family): found.price.double().cpu().numpy() for family, found in triggers.items()}
    return prices | {"latent": distances.numpy()}, triggers


def advantage(prices: Floats) -> Floats:
    """How much cheaper every class is than the others: log(median of the other prices / own), (K,)."""
    logs = np.log(np.maximum(prices, 1e-9))
    others = np.array([np.median(np.delete(logs, k)) for k in range(len(logs))])
    return np.nan_to_num(others - logs, nan=0.0, posinf=0.0, neginf=-50.0)


@cache
def calibration() -> dict[str, Any]:
    """Coefficients, sigmoid, what they were fitted on, and how reliable the probabilities were."""
    text = (resources.files("bimask") / CALIBRATION).read_text()
    fitted: dict[str, Any] = json.loads(text)
    return fitted
