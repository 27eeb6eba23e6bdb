"""Adversarial fine-tuning of a detector, after "Backdoor Mitigation in Object Detection via Adversarial
Fine-Tuning" (Dunnett, Arablouei, Miller, 2026, arXiv 2605.05928).

A trigger relabels an object or erases it, and the defender does not know which. So a perturbation takes
the cheaper of two branches, softly, and the detector learns to see the objects nonetheless, from the
predictions alone that are matched to them. The paper publishes neither gate nor steps nor weights:
**what follows is a reading of its abstract, and ours.**

Of an object, i its matched predictions, z their log-odds, y its class, w the likeliest other one, C the
number of classes:

    L_mis = mean_i [ softplus(-z_w) + softplus(z_y) ]              it is another object
    L_dis = mean_i sum_c softplus(z_c) / C                         it is none
    S = -T log(exp(-L_mis / T) + exp(-L_dis / T))                  the soft minimum
    generation      min over d   mean_objects S - beta L_cls(x + d)
    repair          min over w   L_det(x) + weight * L_rep(x + d)
    L_rep = mean_i [ softplus(-z_y) + gamma sum_{c != y} softplus(z_c) ]

with L_cls the detector's own classification loss on the matched predictions, and T a share of what the
branches' losses are where the perturbations start. The gate is the gradient of S: the weights
softmax(-L / T) of the two branches. T towards 0 takes the cheaper branch alone (`gate: hard`), a large
T their mean; `gate: misclassification` and `gate: disappearance` are one branch alone.

`learned: margin` presses w alone in L_rep; `learned: own` takes L_cls in its place. Both keep less of
the clean precision: the margin lifts every class but two, and a focal loss hardly presses what is below
a quarter.

Perturbations of whole boxes hide the objects before they look like triggers, and what learns on them
forgets. `region: patches` leaves most of an object as it is: a square of a fifth to a half of its side,
at a place drawn anew, may change by `radius`, here to any colour. That triggers are local is all that
it supposes of them.

Use it where nobody knows what the trigger does, with some hundred clean pictures. It costs
`attack_steps` + 2 passes forward and back of every picture an epoch. It needs boxes and labels, and a
detector of a family whose assigner is known (`bimask.detection.nets.matched`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from bimask.defences.settings import Search
from bimask.detection.defences.base import Epochs, LearningRate, Pictures
from bimask.detection.defences.perturbed import Objective, Region
from bimask.detection.defences.repair import (
    AGAINST,
    REGION,
    Against,
    AttackSteps,
    Radius,
    Repair,
    RepairConfig,
    Weight,
)
from bimask.detection.nets.detector import Detector
from bimask.detection.nets.matched import Matched, matched

Gate = Literal["soft", "hard", "misclassification", "disappearance"]
Learned = Literal["margin", "all", "own"]


class SoftBranchConfig(RepairConfig):
    """The settings of the soft branch; none is published, and all are our readings."""

    lr: LearningRate = 0.007
    epochs: Epochs = 12
    radius: Radius = 1.0
    attack_steps: AttackSteps = 3
    region: Region = Field("patches", description=REGION)
    against: Against = Field("suspect", description=AGAINST)
    weight: Weight = 0.1
    gate: Gate = Field(
        "soft", description="how the two branches blend: softly, the cheaper one, or one alone"
    )
    temperature: Annotated[
        float,
        Field(gt=0, description="T of the soft gate, in shares of the branches' first losses"),
        Search(0.05, 2, log=True),
    ] = 0.5
    beta: Annotated[
        float,
        Field(ge=0, description="how far perturbations also raise the detector's classification loss"),
        Search(0, 1),
    ] = 0.1
    learned: Learned = Field(
        "all",
        description="what matched predictions learn on perturbed pictures: their class against all "
        "others, or against the likeliest (margin), or the detector's own classification loss",
    )
    gamma: Annotated[
        float,
        Field(ge=0, description="of the other classes in the repair, beside the object's own"),
        Search(0.5, 8, log=True),
    ] = 1.25


class SoftBranch(Repair[SoftBranchConfig]):
    """Adversarial fine-tuning whose perturbations take the cheaper of two branches, softly."""

    name = "soft_branch"
    config = SoftBranchConfig
    needs_family = True

    def objective(self, detector: Detector, batch: Pictures, config: SoftBranchConfig) -> Objective:
        """S - beta L_cls; the temperature is that of the first time it is asked."""
        first: list[Tensor] = []

        def blended(images: Sequence[Tensor]) -> Tensor:
            seen = matched(detector, images, batch.labels)
            losses = branch_losses(seen)
            if not first:
                known = losses.detach()[losses.isfinite()]
                first.append(config.temperature * known.mean() if len(known) else known.sum() + 1)
            return blend(losses, config.gate, first[0]).mean() - config.beta * seen.loss

        return blended

    def terms(self, detector: Detector, batch: Pictures, config: SoftBranchConfig) -> dict[str, Tensor]:
        """What the matched predictions alone say."""
        seen = matched(detector, batch.images, batch.labels)
        if config.learned == "own":
            return {"matched": seen.loss}
        every = config.learned == "all"
        return {"matched": repair_loss(seen, config.gamma, every=every)}


def branch_losses(seen: Matched) -> Tensor:
    """L_mis and L_dis of every object that a prediction is matched to: (J, 2) >= 0; the first is
    infinite where there is no other class."""
    own, other = own_and_other(seen)
    rows = torch.stack([F.softplus(-other) + F.softplus(own), F.softplus(seen.logits).mean(1)], dim=1)
    objects = torch.stack([seen.picture, seen.object], 1)
    found, place, counts = objects.unique(dim=0, return_inverse=True, return_counts=True)
    total = rows.new_zeros(len(found), 2).index_add(0, place, rows)
    return total / counts[:, None]


def own_and_other(seen: Matched) -> tuple[Tensor, Tensor]:
    """z_y and z_w of every matched prediction: (M,) each; z_w is -inf where there is no other class."""
    own = seen.logits.gather(1, seen.labels[:, None])
    others = seen.logits.scatter(1, seen.labels[:, None], -torch.inf)
    return own.squeeze(1), others.amax(1)


def blend(losses: Tensor, gate: Gate, temperature: Tensor | float) -> Tensor:
    """What perturbations of an object make small: (J, 2) -> (J,).

    Args:
        losses: of the two branches.
        gate: see the settings.
        temperature: T > 0, of the soft gate.
    """
    if gate == "misclassification":
        return losses[:, 0]
    if gate == "disappearance":
        return losses[:, 1]
    if gate == "hard":
        return losses.amin(1)
    return -temperature * torch.logsumexp(-losses / temperature, 1)


def repair_loss(seen: Matched, gamma: float, *, every: bool) -> Tensor:
    """L_rep; 0 where no prediction is matched.

    Args:
        every: whether it presses all other classes, and not the likeliest alone.
    """
    own, other = own_and_other(seen)
    pressed = F.softplus(other)
    if every:
        pressed = F.softplus(seen.logits).sum(1) - F.softplus(own)
    return (F.softplus(-own) + gamma * pressed).sum() / max(1, len(own))
