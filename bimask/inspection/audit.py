"""Is this model backdoored, and towards which class? From the model and clean images alone.

Every class k is given how much cheaper it is to reach than the others are, one number a kind of
evidence:

    e_k = log(median of the other classes' prices / price_k)

with the prices of all families of triggers (`bimask.inspection.class_triggers`) and the latent distance
(`bimask.inspection.latent`). A logistic regression turns the numbers of a class into a score; the
highest score is the model's and its class the suspected target; Platt's sigmoid (1999) turns that into
a probability. Both were fitted on models of known kind, clean and backdoored, whose description is in
`CALIBRATION` beside the coefficients.

A probability holds for models like those alone, so a verdict is given only where the model is of a kind
of net, its images of a size, and its prices in a range that the calibration has seen, and where the
probability is not in the band between. Everything else is "unknown", with the reasons; the evidence is
there either way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bimask.errors import DataError
from bimask.files.bounded import parsed_json
from bimask.inspection.class_triggers import (
    ClassTriggers,
    Family,
    find_class_triggers,
    prepared,
    steps_of,
)
from bimask.inspection.latent import latent_distances
from bimask.nets.admission import admit

CALIBRATION = "audit_calibration.json"
SEARCHED: tuple[Family, ...] = ("patch", "pattern", "warp", "tone")
IMAGES = 20  # that triggers are searched on, whatever number is given
LOOKED = 500  # whose answers are asked to pick them
AT_ONCE = 100  # images in one pass of those
MIN_CLASSES = 4  # with fewer there is no median of others to speak of
UNSEEN = (
    "A trigger of an unseen kind stays unseen: what is looked for are patches, added patterns, warps "
    "and tone curves that send all other classes to one class, not backdoors of one source class or "
    "of all classes to all."
)

Floats = NDArray[np.float64]
Verdict = Literal["backdoored", "no sign", "unknown"]


@dataclass(frozen=True)
class NetKind:
    """What can be measured of a net and its images, and decides whether the calibration speaks of them.

    Attributes:
        net: the kind of its layers.
        linear: whether the logits come from an nn.Linear.
        classes, channels, height, width: of logits and images.
        images, answered: how many clean images were looked at, and how many classes they are of, by
            the model's own answers.
    """

    net: Literal["tokens", "convolutions with batch norm", "convolutions", "linear layers", "other"]
    linear: bool
    classes: int
    channels: int
    height: int
    width: int
    images: int
    answered: int


@dataclass(frozen=True)
class Measured:
    """What an audit measures before it judges.

    Attributes:
        prices: kind -> (K,): prices of the triggers' families, and "latent" if there is such a layer.
        triggers: of every family in `SEARCHED`.
        kind: of the net and its images.
    """

    prices: dict[str, Floats]
    triggers: dict[Family, ClassTriggers]
    kind: NetKind


@dataclass(frozen=True)
class Judged:
    """What prices say by a calibration; see `Audit`."""

    verdict: Verdict
    reasons: tuple[str, ...]
    probability: float
    target: int
    scores: Floats
    evidence: dict[str, Floats]


@dataclass(frozen=True)
class Audit(Judged):
    """What an audit found.

    Attributes:
        verdict: "unknown" where the calibration does not speak of such a model or is in doubt.
        reasons: for the verdict, complete sentences.
        probability: that the model is backdoored, if it is like those of the calibration and half
            of such models are; in [0, 1]. It means nothing where the verdict is "unknown".
        target: the suspected class, whatever the verdict.
        scores: (K,) of every class; the highest is the target's.
        evidence: kind -> (K,) e_k, of `prices`.
        prices, triggers, kind: as in `Measured`.
    """

    prices: dict[str, Floats]
    triggers: dict[Family, ClassTriggers]
    kind: NetKind


def audit(model: nn.Module, images: Tensor, *, on_step: Callable[[], None] | None = None) -> Audit:
    """Look for a backdoor in `model`; the same call gives the same answer.

    The cost is bounded: triggers are searched on `IMAGES` images, however many are given.

    Args:
        model: images in [0, 1] -> logits (N, K), or what `bimask.nets.admission.admit` makes that of;
            left as it is.
        images: (N, C, H, W) in [0, 1], clean, of the model's device; labels are not needed. A few of
            every class are enough, and the model should not have been trained on them.
        on_step: called after each of `steps(K, N)` steps.

    Raises:
        DataError: no images, images all of which the model gives the same class, or fewer than four
            classes.
        ModelError: the model cannot be asked.
    """
    found = measure(model, images, on_step=on_step)
    judged = judge(found.prices, found.kind, calibration())
    return Audit(**vars(judged), prices=found.prices, triggers=found.triggers, kind=found.kind)


def steps(classes: int, images: int) -> int:
    """How often `on_step` is called."""
    return sum(steps_of(family, classes, min(images, IMAGES)) for family in SEARCHED)


def measure(model: nn.Module, images: Tensor, *, on_step: Callable[[], None] | None = None) -> Measured:
    """What each class costs by every kind of evidence, and the triggers behind it; raises what `audit`
    does."""
    if not len(images):
        raise DataError("An audit needs clean images, got none.")
    admitted = admit(model, images).model
    looked = _spaced(images, LOOKED)
    with torch.no_grad():
        logits = torch.cat([admitted(part) for part in looked.split(AT_ONCE)])
    answers, classes = logits.argmax(1), logits.shape[1]
    if classes < MIN_CLASSES:
        raise DataError(
            f"An audit compares classes, and a model of {classes} has too few; {MIN_CLASSES} are "
            "needed."
        )
    if len(answers.unique()) < 2:
        raise DataError(
            f"The model gives all {len(looked)} clean images the class {int(answers[0])}; give images "
            "of several classes, in [0, 1], of the size that the model takes."
        )
    chosen = looked[picked(answers)]
    net = prepared(admitted, chosen)
    triggers = {f: find_class_triggers(net, chosen, f, on_step=on_step) for f in SEARCHED}
    prices = {str(family): found.price.double().cpu().numpy() for family, found in triggers.items()}
    distances = latent_distances(admitted, chosen)
    if distances is not None:
        prices["latent"] = distances.numpy()
    kind = NetKind(
        net=_net(admitted),
        linear=distances is not None,
        classes=classes,
        channels=images.shape[1],
        height=images.shape[2],
        width=images.shape[3],
        images=len(chosen),
        answered=len(answers.unique()),
    )
    return Measured(prices, triggers, kind)


def picked(answers: Tensor) -> Tensor:
    """Positions of at most `IMAGES` images, as evenly as can be over the classes that they are given.

    Args:
        answers: (N,) the model's own.
    """
    rounds = torch.zeros_like(answers)
    for answer in answers.unique():
        mine = answers == answer
        rounds[mine] = torch.arange(int(mine.sum()), device=answers.device)
    # the first image of every class, then the second of every class, and so on
    order = sorted(range(len(answers)), key=lambda i: (int(rounds[i]), int(answers[i])))
    return torch.tensor(sorted(order[:IMAGES]), device=answers.device)


def advantage(prices: Floats) -> Floats:
    """How much cheaper every class is than the others: log(median of the other prices / own), (K,)."""
    logs = np.log(np.maximum(prices, 1e-9))
    others = np.array([np.median(np.delete(logs, k)) for k in range(len(logs))])
    found: Floats = np.nan_to_num(others - logs, nan=0.0, posinf=0.0, neginf=-50.0)
    return found


def level(prices: Floats) -> float:
    """What the classes of a model cost on the whole: the log of their median price."""
    return float(np.log(np.maximum(np.median(prices), 1e-9)))


def judge(prices: Mapping[str, Floats], kind: NetKind, fitted: Mapping[str, Any]) -> Judged:
    """What prices say of a model.

    Args:
        prices: kind of evidence -> (K,).
        fitted: as `calibration()`.
    """
    evidence = {name: advantage(values) for name, values in prices.items()}
    weights: dict[str, float] = fitted["coefficients"]
    used = [name for name in weights if name in evidence]
    total = sum((weights[name] * evidence[name] for name in used), np.zeros(kind.classes))
    scores = fitted["intercept"] + total
    target = int(np.argmax(scores))
    slope, offset = fitted["platt"]["slope"], fitted["platt"]["offset"]
    probability = float(1 / (1 + np.exp(-(slope * scores[target] + offset))))
    verdict, reasons = _verdict(prices, kind, fitted, probability)
    if verdict == "backdoored":
        ratios = {name: float(np.exp(evidence[name][target])) for name in used}
        cheaper = ", ".join(f"{name} {ratio:.1f} times" for name, ratio in ratios.items() if ratio > 1)
        reasons = (f"One class is cheaper to reach than the median of the others: {cheaper}.",)
    return Judged(verdict, reasons, probability, target, scores, evidence)


def _verdict(
    prices: Mapping[str, Floats], kind: NetKind, fitted: Mapping[str, Any], probability: float
) -> tuple[Verdict, tuple[str, ...]]:
    outside = tuple(_outside(prices, kind, fitted["domain"]))
    if outside:
        return "unknown", outside
    low, high = fitted["band"]["no_sign_below"], fitted["band"]["backdoored_from"]
    if probability >= high:
        return "backdoored", ()
    unlike = _prices_outside(
        prices, _of_size(kind, fitted["domain"])["clean"], "of clean models of the calibration it is"
    )
    if probability < low and unlike:
        return "unknown", tuple(unlike)
    if probability < low:
        return "no sign", (
            "No class is so much cheaper to reach than the others as the targets of the backdoored "
            "models of the calibration are.",
        )
    return "unknown", (
        f"The most suspicious class is cheap to reach, but not more than in some models of the "
        f"other kind: the probability {probability:.2f} is between {low:.2f} and {high:.2f}.",
    )


def _outside(prices: Mapping[str, Floats], kind: NetKind, domain: Mapping[str, Any]) -> list[str]:
    """Sentences on what the calibration has not seen."""
    found = []
    if not kind.linear:
        found.append(
            "The logits come from no linear layer, and those of all models of the calibration do."
        )
    if kind.net not in domain["nets"]:
        found.append(
            f"The audit was not calibrated on nets of the kind {kind.net!r}, only on "
            f"{_listed([repr(name) for name in domain['nets']])}."
        )
    if kind.channels not in domain["channels"]:
        channels = _listed([str(number) for number in domain["channels"]])
        found.append(
            f"The images have {kind.channels} channels; the audit was calibrated on images of "
            f"{channels}."
        )
    if not _of_size(kind, domain):
        found.append(
            f"The images are {kind.height} pixels high and {kind.width} wide; the audit was calibrated "
            f"on images of about {_listed(list(domain['sizes']))}."
        )
    least, most = domain["classes"]
    if not least <= kind.classes <= most:
        found.append(
            f"The model has {kind.classes} classes; the calibration holds for {least} to {most}."
        )
    if kind.answered < kind.classes * domain["answered"]:
        found.append(
            f"The clean images are given only {kind.answered} of {kind.classes} classes by the model; "
            "give images of all classes."
        )
    if kind.images < domain["images"]:
        found.append(
            f"There are only {kind.images} clean images; the calibration holds from "
            f"{domain['images']} on."
        )
    if not found:
        found += _prices_outside(prices, _of_size(kind, domain)["all"], "in the calibration it is")
    return found


def _of_size(kind: NetKind, domain: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Price ranges of the calibration's models whose images are about as large as these, or none."""
    for size, ranges in domain["sizes"].items():
        sides = [side / float(size) for side in (kind.height, kind.width)]
        if all(1 / domain["size_factor"] <= side <= domain["size_factor"] for side in sides):
            found: dict[str, dict[str, list[float]]] = ranges
            return found
    return {}


def _prices_outside(
    prices: Mapping[str, Floats], ranges: Mapping[str, list[float]], where: str
) -> list[str]:
    """Sentences on the kinds of evidence by which the classes' median price is not between two logs."""
    found = []
    for name, (cheapest, dearest) in ranges.items():
        if name in prices and not cheapest <= level(prices[name]) <= dearest:
            word = "cheap" if level(prices[name]) < cheapest else "dear"
            found.append(
                f"By {name} all classes are unusually {word} to reach: the median price is "
                f"{np.median(prices[name]):.3g}, and {where} from {np.exp(cheapest):.3g} to "
                f"{np.exp(dearest):.3g}."
            )
    return found


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _spaced(images: Tensor, most: int) -> Tensor:
    """At most so many, evenly spaced."""
    count = min(len(images), most)
    return images[torch.arange(count, device=images.device) * len(images) // count]


def _net(
    model: nn.Module,
) -> Literal["tokens", "convolutions with batch norm", "convolutions", "linear layers", "other"]:
    """The kind of a net by the layers it is made of; a layer norm or attention makes tokens."""
    layers = list(model.modules())

    def any_of(*kinds: type[nn.Module]) -> bool:
        return any(isinstance(layer, kinds) for layer in layers)

    if any_of(nn.LayerNorm, nn.MultiheadAttention):
        return "tokens"
    if any_of(_ConvNd):
        return "convolutions with batch norm" if any_of(_BatchNorm) else "convolutions"
    return "linear layers" if any_of(nn.Linear) else "other"


@cache
def calibration() -> dict[str, Any]:
    """Coefficients, sigmoid, band and domain, what they were fitted on, and how reliable they were."""
    text = (resources.files("bimask.inspection") / CALIBRATION).read_text()
    fitted: dict[str, Any] = parsed_json(text.encode())
    return fitted
