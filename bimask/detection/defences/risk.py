"""What adversarial pictures say of a repaired detector, where nobody knows the trigger.

A backdoor is a weakness that its owner knows. Clean pictures that no repair learned on are perturbed
against the suspect, harder than a repair does it: more steps, another seed, each branch by itself
(`bimask.detection.defences.soft_branch`), and inside the objects' boxes alone, where triggers sit. The
objects that this relabels, or erases, are the suspect's weak ones. Risk is the share of them on which a
repaired detector still errs likewise, the mean over the two branches; of the suspect itself it is 1.

It says how much of the suspect's weakness is left, and nothing of weaknesses that are new: the pictures
are not made anew against the repaired detector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bimask.detection.defences.base import Pictures, admitted, pictures_of
from bimask.detection.defences.perturbed import Ball, perturbed
from bimask.detection.defences.soft_branch import Gate, SoftBranch, SoftBranchConfig
from bimask.detection.metrics.scores import classes_at
from bimask.detection.nets.detector import Detector
from bimask.detection.objects import Found
from bimask.errors import DataError

BALL = Ball(budget=0.3, steps=20, region="boxes")
BRANCHES: tuple[Gate, ...] = ("misclassification", "disappearance")
PASS = 16  # pictures


@dataclass(frozen=True)
class WeakObjects:
    """Objects on which perturbations of one branch succeed against the suspect.

    Attributes:
        branch: what the perturbations want.
        images: perturbed, (3, H, W) each; several objects may be in one.
        picture: (N,) int64, the image of each object.
        boxes: (N, 4).
        labels: (N,) int64.
    """

    branch: Gate
    images: tuple[Tensor, ...]
    picture: Tensor
    boxes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> WeakObjects:
        """The same on another device."""
        return replace(
            self,
            images=tuple(image.to(device) for image in self.images),
            boxes=self.boxes.to(device),
        )

    def share(self, detector: nn.Module) -> float:
        """The share of them on which a detector errs; NaN where there are none."""
        if not len(self):
            return math.nan
        return float(_errs(detector, self).double().mean())


@dataclass(frozen=True)
class AdversarialRisk:
    """The suspect's weak objects, to ask any number of repaired detectors about."""

    weak: tuple[WeakObjects, ...]

    @classmethod
    def of(
        cls,
        suspect: nn.Module,
        clean: Any,
        generator: torch.Generator,
        *,
        ball: Ball = BALL,
        on_step: Callable[[], object] | None = None,
    ) -> AdversarialRisk:
        """Look for the suspect's weak objects among those that it finds when clean.

        Args:
            suspect: a `Detector`; it stays as it is.
            clean: as of a defence, but none that a repair learned on.
            generator: CPU.
            on_step: called after each batch of pictures in each branch.

        Raises:
            ModelError: a detector of a family whose assigner is not known.
            DataError: no perturbation of any branch succeeds.
        """
        pictures, detector = pictures_of(clean), admitted(suspect).requires_grad_(False)
        found = cls(
            tuple(_weak(detector, pictures, branch, ball, generator, on_step) for branch in BRANCHES)
        )
        if not any(map(len, found.weak)):
            raise DataError(
                f"No perturbation of {len(pictures)} clean pictures makes the suspect err, so that "
                "nothing can be asked of a repaired one; give more pictures."
            )
        return found

    def __call__(self, detector: nn.Module) -> float:
        """The risk of a repaired detector, in [0, 1]; branches without a weak object say nothing."""
        shares = [weak.share(detector) for weak in self.weak]
        known = [share for share in shares if not math.isnan(share)]
        return sum(known) / len(known)

    def to(self, device: torch.device | str) -> AdversarialRisk:
        """The same on another device."""
        return AdversarialRisk(tuple(weak.to(device) for weak in self.weak))

    @staticmethod
    def steps(images: int) -> int:
        """How often `on_step` is called for so many pictures."""
        return len(BRANCHES) * -(-images // PASS)


def held_out_risk(before: nn.Module, after: nn.Module, clean: Any, generator: torch.Generator) -> float:
    """The risk of `after`, a repaired `before`, by clean pictures that the repair did not learn on; see
    `AdversarialRisk`, which asks several about one suspect at the cost of one."""
    return AdversarialRisk.of(before, clean, generator)(after)


def _weak(
    detector: Detector,
    pictures: Pictures,
    branch: Gate,
    ball: Ball,
    generator: torch.Generator,
    on_step: Callable[[], object] | None,
) -> WeakObjects:
    config = SoftBranchConfig(gate=branch, beta=0)
    images: list[Tensor] = []
    for start in range(0, len(pictures), PASS):
        batch = pictures.at(range(start, min(len(pictures), start + PASS)))
        objective = SoftBranch().objective(detector, batch, config)
        images += perturbed(batch, objective, ball, generator)
        if on_step is not None:
            on_step()
    counts = torch.tensor([len(target["labels"]) for target in pictures.labels])
    every = WeakObjects(
        branch,
        tuple(images),
        torch.arange(len(counts)).repeat_interleave(counts),
        torch.cat([target["boxes"] for target in pictures.labels]),
        torch.cat([target["labels"] for target in pictures.labels]),
    )
    seen = _classes(detector, replace(every, images=tuple(pictures.images)))
    known = [int(label) in at for label, at in zip(every.labels, seen, strict=True)]
    chosen = torch.tensor(known) & _errs(detector, every)
    return replace(
        every,
        picture=every.picture[chosen],
        boxes=every.boxes[chosen.to(every.boxes.device)],
        labels=every.labels[chosen.to(every.labels.device)],
    )


def _errs(detector: nn.Module, asked: WeakObjects) -> Tensor:
    """Whether a detector finds another class at each object, or not its own: (N,) bool."""
    seen = _classes(detector, asked)
    labels = asked.labels.tolist()
    if asked.branch == "misclassification":
        return torch.tensor([bool(at - {label}) for at, label in zip(seen, labels, strict=True)])
    return torch.tensor([label not in at for at, label in zip(seen, labels, strict=True)])


@torch.no_grad()
def _classes(detector: nn.Module, asked: WeakObjects) -> list[set[int]]:
    """The classes that a detector in eval mode finds at each object."""
    found: list[Found] = []
    for start in range(0, len(asked.images), PASS):
        found += detector(asked.images[start : start + PASS])
    places = asked.picture.tolist()
    return [classes_at(found[place], box) for place, box in zip(places, asked.boxes, strict=True)]
