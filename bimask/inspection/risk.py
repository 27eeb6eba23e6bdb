"""What can be said of a purified model without the attack: clean images and synthesised triggers alone.

Triggers are made once, against the suspect model f, on clean images x that the defence did not see. Two
kinds, stronger than those the defence works with:

    adversarial   10 sign-gradient steps that move each image away from f's own answer, L-inf 0.3 and
                  0.8, clipped to [0, 1]
    universal     a patch and a pattern towards every class, see `bimask.inspection.class_triggers`

and a purified model g is asked how far it still follows them:

    same_answer   among adversarial images that f errs on, the share with g(x') = f(x'): the same error
    carried_over  among images that class k's trigger sends there under f, the share with g(T_k(x)) = k,
                  weighted by how suspicious the classes are: w = softmax(-8 sum of the log prices), of
                  patch price, pattern price and, where the last layer is linear, latent distance
    risk          (carried_over + same_answer) / 2, in [0, 1]: low where few short cuts of f are left

A backdoor is not measured by any of them: g may have learned to resist these triggers and not the
attacker's, or the attacker's may be of a kind that no search here can find. `benchmarks/blind.md` has
how the order by risk agrees with the order by the true attack success rate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from bimask.data import ImageData
from bimask.errors import DataError
from bimask.inspection.class_triggers import (
    ClassTriggers,
    Family,
    find_class_triggers,
    prepared,
    steps_of,
)
from bimask.inspection.latent import latent_distances
from bimask.inspection.shared_errors import BUDGETS, Stressed, adversarial, answers_of, share

CARRIERS: tuple[Family, ...] = ("patch", "pattern")
FITTED_ON = 3  # one image of so many makes the universal triggers; all of them show what they do
SHARPNESS = 8.0
LEAST_WEIGHT = 0.01  # classes below it are not asked about: most are
PER_CLASS = 16  # images that a probe is made of


def probe_images(val: ImageData, *, seed: int) -> ImageData:
    """The clean images of `val` that a probe is made of; fewer where a class has fewer."""
    smallest = int(torch.bincount(val.labels, minlength=val.num_classes).min())
    return val.clean_subset(min(PER_CLASS, max(1, smallest)), seed=seed)


@dataclass(frozen=True)
class RiskScores:
    """What is said of one purified model. All are shares in [0, 1], over the images that count.

    Attributes:
        agreement: with the suspect model on clean images; 1 minus this bounds the accuracy lost.
        inverse_agreement: of the inverse twin with the suspect model on clean images; None where the
            defence has none.
        same_answer: mean over the budgets.
        carried_over: mean over the families.
    """

    agreement: float
    inverse_agreement: float | None
    same_answer: float
    carried_over: float

    @property
    def risk(self) -> float:
        """What blind selection makes small."""
        return (self.same_answer + self.carried_over) / 2

    def numbers(self) -> dict[str, float]:
        """All of it under its names, risk too."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return known | {"risk": self.risk}


class RiskProbe:
    """A suspect model with what was synthesised against it; asked of one purified model after another.

    Args:
        suspect: images in [0, 1] -> logits, in eval mode; left as it is.
        images: (N, C, H, W) in [0, 1], clean, of the suspect's device; neither those that the defence
            learns on nor those that the choice is reported on.
        on_step: called after each of `Probe.steps(K, N)` steps of the universal triggers.

    Attributes:
        concentration: the largest share of one class among the suspect's answers to the adversarial
            images that it errs on, mean over the budgets; 1 / K means none stands out.
        weights: (K,) how suspicious each class is, in [0, 1], of sum 1; 0 for less than a hundredth.

    Raises:
        DataError: fewer than two images, or no image that the suspect errs on after the search.
    """

    def __init__(
        self, suspect: nn.Module, images: Tensor, *, on_step: Callable[[], None] | None = None
    ) -> None:
        if len(images) < 2:
            raise DataError(f"Evidence needs two clean images or more, got {len(images)}.")
        self.images = images
        self.answers = answers_of(suspect, images)
        self.adversarial = [Stressed.of(suspect, adversarial(suspect, images, b)) for b in BUDGETS]
        fitted_on = images[::FITTED_ON]
        net = prepared(suspect, fitted_on)
        triggers = [find_class_triggers(net, fitted_on, f, on_step=on_step) for f in CARRIERS]
        prices = [found.price.double().cpu() for found in triggers]
        distances = latent_distances(suspect, images)
        self.weights = suspicion(prices if distances is None else [*prices, distances])
        self.universal = [self._followed(suspect, found) for found in triggers]
        self.concentration = self._concentration()

    @property
    def asked(self) -> Tensor:
        """The classes with a weight, (J,)."""
        return self.weights.nonzero().flatten()

    @staticmethod
    def steps(classes: int, images: int) -> int:
        """How often `on_step` is called."""
        return sum(steps_of(family, classes, -(-images // FITTED_ON)) for family in CARRIERS)

    @torch.no_grad()
    def __call__(self, model: nn.Module, inverse: nn.Module | None = None) -> RiskScores:
        """Ask a purified model, and its inverse twin where it has one; forward passes only."""
        return RiskScores(
            agreement=share(answers_of(model, self.images) == self.answers),
            inverse_agreement=None
            if inverse is None
            else share(answers_of(inverse, self.images) == self.answers),
            same_answer=sum(s.same_answer(model, self.answers) for s in self.adversarial)
            / len(BUDGETS),
            carried_over=sum(self._carried_over(model, u) for u in self.universal) / len(CARRIERS),
        )

    def to(self, device: torch.device | str) -> RiskProbe:
        """The same on another device."""
        moved = copy.copy(self)
        moved.images, moved.answers = self.images.to(device), self.answers.to(device)
        moved.adversarial = [stressed.to(device) for stressed in self.adversarial]
        moved.universal = [universal.to(device) for universal in self.universal]
        return moved

    def _followed(self, suspect: nn.Module, triggers: ClassTriggers) -> _Universal:
        towards = self.asked.to(self.images.device)
        triggered = triggers.apply(self.images)[towards]
        followed = (
            answers_of(suspect, triggered.flatten(0, 1)).view(len(towards), -1) == towards[:, None]
        )
        return _Universal(triggered, towards[:, None], followed & (self.answers != towards[:, None]))

    def _carried_over(self, model: nn.Module, universal: _Universal) -> float:
        answers = answers_of(model, universal.images.flatten(0, 1)).view(universal.counts.shape)
        same = (answers == universal.towards) & universal.counts
        rates = same.sum(1).double() / universal.counts.sum(1).clamp_min(1)
        return float((self.weights[self.asked] * rates.cpu()).sum())

    def _concentration(self) -> float:
        shares = []
        for stressed in self.adversarial:
            wrong = stressed.answers[stressed.answers != self.answers]
            if not len(wrong):
                raise DataError(
                    "The suspect model answers all adversarial images as it does the clean ones, so "
                    "they say nothing; are the images in [0, 1], and does the model take such?"
                )
            shares.append(wrong.bincount().max().item() / len(wrong))
        return sum(shares) / len(shares)


@dataclass(frozen=True)
class _Universal:
    """Triggered images towards some classes (J, N, C, H, W), the classes (J, 1), which count (J, N)."""

    images: Tensor
    towards: Tensor
    counts: Tensor

    def to(self, device: torch.device | str) -> _Universal:
        return _Universal(*(t.to(device) for t in (self.images, self.towards, self.counts)))


def costs(prices: list[Tensor]) -> Tensor:
    """What reaching each class costs by all kinds of price together: the sum of their logs, (K,).

    Args:
        prices: (K,) each, >= 0; infinite where nothing reaches the class.
    """
    return torch.stack([price.double().clamp_min(1e-9).log() for price in prices]).sum(0)


def suspicion(prices: list[Tensor]) -> Tensor:
    """Weights of the classes from what each costs: softmax(-8 costs), (K,) of sum 1.

    Args:
        prices: (K,) each, >= 0; a class with an infinite price has no weight, as one below a hundredth.
    """
    weights = (-SHARPNESS * costs(prices)).softmax(0)
    weights = weights.masked_fill(weights < LEAST_WEIGHT, 0)
    return weights / weights.sum()


__all__ = ["RiskProbe", "RiskScores", "costs", "suspicion"]
