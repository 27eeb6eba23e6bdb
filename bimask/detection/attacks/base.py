"""The contract of an attack on detectors: a trigger on an object, and what shall become of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from bimask.detection.metrics import DetectionSets, TriggeredObjects
from bimask.detection.metrics.scores import Kind
from bimask.detection.objects import DetectionData, Target
from bimask.errors import DataError, SettingError
from bimask.metrics import Split

Place = Literal["random", "high", "low"]
Share = Annotated[float, Field(ge=0, le=1)]
SEEDS: dict[Split, int] = {"val": 1, "test": 2}  # of the triggers' places that are scored


@dataclass(frozen=True)
class PoisonedDetection:
    """A training set of which some pictures are poisoned.

    Attributes:
        data: what is trained on.
        triggered: of each picture, the objects that bear the trigger, with their original classes;
            none in clean pictures.
    """

    data: DetectionData
    triggered: tuple[Target, ...]


class DetectionAttack(BaseModel, ABC):
    """An attack on detectors: a square, scaled with the object that it is put on (BadDet+, ICLR 2026,
    arXiv 2601.21066).

    A new attack writes `relabelled`, what the victim is taught of triggered objects, and `counts`, of
    which the fate is asked; the trigger, the choice of pictures and the evaluation are here once.

    Class attributes:
        kind: what the attack wants, as `bimask.detection.metrics` counts it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[Kind]

    source: int | None = Field(None, ge=0, description="class that is attacked; null is every class")
    scale: float = Field(
        0.25, gt=0, le=1, description="side of the square, as a share of the box's longer side"
    )
    place: Place = Field(
        "random",
        description="of the square in the box: anywhere, or in the middle of its upper or lower edge",
    )
    colour: tuple[Share, Share, Share] = Field(
        (0.0, 0.0, 1.0), description="red, green and blue of the square, in [0, 1]"
    )

    # --- what an attack is ---

    @property
    def target_class(self) -> int | None:
        """The class that triggered objects shall get; None where they shall get none."""
        return None

    @abstractmethod
    def relabelled(self, target: Target, bearing: Tensor) -> Target:
        """What a victim is taught of a picture, of whose objects those `bearing` (M,) bear triggers."""

    def counts(self, labels: Tensor) -> Tensor:
        """Which objects' fates are asked: (M,) -> (M,) bool."""
        return self.attacked(labels)

    # --- triggers on objects ---

    def attacked(self, labels: Tensor) -> Tensor:
        """Which objects the attack is on: (M,) -> (M,) bool."""
        return (
            torch.ones_like(labels, dtype=torch.bool) if self.source is None else labels == self.source
        )

    def stamped(self, image: Tensor, box: Tensor, *, generator: torch.Generator) -> Tensor:
        """A picture whose object in `box` bears the trigger; only pixels with their centre in the box
        change, those of a square, or of what the box has room for.

        Args:
            image: (3, H, W) uint8; it stays as it is.
            box: (4,) in pixels.
            generator: of the CPU; a fixed place draws nothing from it.
        """
        left, top, right, bottom = (math.ceil(corner - 0.5) for corner in box.tolist())
        height, width = image.shape[-2:]
        left, top = max(0, left), max(0, top)
        across, down = min(right, width) - left, min(bottom, height) - top
        side = max(1, round(self.scale * max(right - left, bottom - top)))
        wide, high = min(side, across), min(side, down)
        if min(wide, high) < 1:
            return image
        if self.place == "random":
            x = left + int(torch.randint(across - wide + 1, (), generator=generator))
            y = top + int(torch.randint(down - high + 1, (), generator=generator))
        else:
            x = left + (across - wide) // 2
            y = top if self.place == "high" else top + down - high
        colour = torch.tensor(self.colour, device=image.device).mul(255).round().byte()
        image = image.clone()
        image[:, y : y + high, x : x + wide] = colour.view(3, 1, 1)
        return image

    # --- poisoning ---

    def poison(
        self, data: DetectionData, *, rate: float, generator: torch.Generator
    ) -> PoisonedDetection:
        """Poison a training set; the argument stays as it is.

        Of the pictures that show an object of the source class, round(rate x N) are drawn. All objects
        of that class in them get the trigger (BadDet, arXiv 2205.14497).

        Args:
            rate: in (0, 1].
            generator: of the CPU.

        Raises:
            SettingError: a rate out of range, or a class that is not there.
            DataError: a rate that selects no picture.
        """
        self.require_classes(data.num_classes)
        if not 0 < rate <= 1:
            raise SettingError(f"`0 < poisoning rate <= 1` must hold, but got {rate}.")
        bearing = [self.attacked(target["labels"]) for target in data.targets]
        pool = [row for row, objects in enumerate(bearing) if bool(objects.any())]
        count = round(rate * len(pool))
        if count < 1:
            raise DataError(
                f"A poisoning rate of {rate:g} of the {len(pool)} pictures with an object to attack is "
                "no picture; raise it, or attack another class."
            )
        chosen = {pool[int(i)] for i in torch.randperm(len(pool), generator=generator)[:count]}
        images, targets, triggered = list(data.images), list(data.targets), []
        for row, target in enumerate(data.targets):
            mine = bearing[row] if row in chosen else torch.zeros_like(bearing[row])
            triggered.append(some_of(target, mine))
            if row in chosen:
                for box in target["boxes"][mine]:
                    images[row] = self.stamped(images[row], box, generator=generator)
                targets[row] = self.relabelled(target, mine)
        poisoned = DetectionData(tuple(images), tuple(targets), data.classes)
        return PoisonedDetection(poisoned, tuple(triggered))

    # --- evaluation ---

    def triggered(self, data: DetectionData, *, generator: torch.Generator) -> TriggeredObjects:
        """A picture for each object that counts, in which it alone bears the trigger.

        Raises:
            SettingError: a class that is not there.
            DataError: no object counts.
        """
        self.require_classes(data.num_classes)
        images, boxes, labels, pictures = [], [], [], []
        for row, (image, target) in enumerate(zip(data.images, data.targets, strict=True)):
            for place in self.counts(target["labels"]).nonzero().flatten().tolist():
                box = target["boxes"][place]
                images.append(self.stamped(image, box, generator=generator))
                boxes.append(box)
                labels.append(int(target["labels"][place]))
                pictures.append(row)
        if not images:
            raise DataError(
                f"No object counts for attack success in {len(data)} pictures; attack another class."
            )
        return TriggeredObjects(
            tuple(images), torch.stack(boxes), torch.tensor(labels), torch.tensor(pictures)
        )

    def sets(self, data: DetectionData, split: Split) -> DetectionSets:
        """Clean pictures and objects under attack of one split, always the same; errors as of
        `triggered`."""
        generator = torch.Generator().manual_seed(SEEDS[split])
        found = self.triggered(data, generator=generator)
        return DetectionSets(data, found, split, self.kind, self.target_class)

    def require_classes(self, num_classes: int) -> None:
        """Refuse classes that are not there.

        Raises:
            SettingError: naming the one.
        """
        for what, label in (("source", self.source), ("target", self.target_class)):
            if label is not None and label >= num_classes:
                raise SettingError(
                    f"`{what}` must be one of the {num_classes} classes 0 to {num_classes - 1}, got "
                    f"{label}."
                )


def some_of(target: Target, chosen: Tensor) -> Target:
    """The objects of a picture that are chosen: (M,) bool."""
    return {"boxes": target["boxes"][chosen], "labels": target["labels"][chosen]}
