"""What defences of detectors share: their clean pictures, batches of them, the steps of SGD.

They are run, kept and resumed as those of classifiers (`bimask.defences.base`); the images of their
clean data are a list of pictures, which may differ in size, and the labels a list of targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bimask.defences.base import Config
from bimask.defences.loop import shuffled, steps_an_epoch
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.sgd import Momentum, WeightDecay, weights_of
from bimask.defences.simple import SimpleDefence
from bimask.detection.nets.detector import Detector
from bimask.detection.nets.matched import require_family
from bimask.detection.objects import Target
from bimask.errors import ModelError, SettingError
from bimask.masking.copies import copied
from bimask.nets.admission import unwrapped

LearningRate = Annotated[
    float, Field(gt=0, description="of SGD, in the first epoch"), Search(1e-4, 1e-1, log=True)
]
Epochs = Annotated[
    int, Field(ge=1, description="times that every picture is seen"), Search(5, 40, log=True)
]
BatchSize = Annotated[int, Field(ge=1, description="pictures a step")]
Flip = Annotated[
    bool, Field(description="whether half of the pictures are mirrored left to right, anew each step")
]


@dataclass(frozen=True)
class Pictures:
    """Clean pictures of one device.

    Attributes:
        images: (3, H, W) float in [0, 1] each.
        labels: the targets.
    """

    images: Sequence[Tensor]
    labels: Sequence[Target]

    def __len__(self) -> int:
        return len(self.images)

    def at(self, rows: Sequence[int]) -> Pictures:
        """Those at these places."""
        return Pictures([self.images[row] for row in rows], [self.labels[row] for row in rows])


class DetectorConfig(DefenceConfig):
    """SGD over all pictures for some epochs; the learning rate follows a cosine to 0 over them."""

    lr: LearningRate = 0.005
    epochs: Epochs = 10
    batch_size: BatchSize = 16
    momentum: Momentum = 0.9
    weight_decay: WeightDecay = 5e-4
    flip: Flip = False

    def steps(self, images: int) -> int:
        """Batches over all epochs."""
        return self.epochs * steps_an_epoch(self.learned_on(images), self.batch_size)

    def learned_on(self, images: int) -> int:
        """How many of so many pictures the weights learn on."""
        return images


class DetectorDefence(SimpleDefence[Config]):
    """A defence of detectors.

    Class attributes:
        needs_family: whether it asks which predictions stand for which object.
    """

    needs_labels = True
    needs_family = False

    def check(self, model: nn.Module, images: Any) -> None:
        """Refuse a model that is no `Detector`, or that the method can do nothing for.

        Raises:
            ModelError: it is.
        """
        detector = admitted(model)
        if self.needs_family:
            require_family(detector.net)

    def check_clean(self, clean: Any) -> None:
        pictures_of(clean)


def pictures_of(clean: Any) -> Pictures:
    """The clean data of a defence.

    Raises:
        SettingError: no pictures, not as many targets, other pictures than (3, H, W) floats in [0, 1],
            or not one object in all.
    """
    images, labels = list(clean.images), clean.labels
    if not images or labels is None or len(labels) != len(images):
        raise SettingError(
            f"Clean pictures need a target each, but got {len(images)} pictures and "
            f"{0 if labels is None else len(labels)} targets."
        )
    for image in images:
        if image.ndim != 3 or len(image) != 3 or not image.is_floating_point():
            raise SettingError(
                "Clean pictures must be float tensors (3, H, W), got "
                f"{tuple(image.shape)} of {image.dtype}."
            )
        low, high = (value.item() for value in image.aminmax())
        if not (low >= 0 and high <= 1):
            raise SettingError(
                f"Clean pictures must lie in [0, 1], got [{low:g}, {high:g}]; divide bytes by 255 and "
                "leave normalisation to the model."
            )
    if not any(len(target["labels"]) for target in labels):
        raise SettingError(
            f"There is no object in {len(images)} clean pictures; give some with boxes and labels."
        )
    return Pictures(images, list(labels))


def admitted(model: nn.Module) -> Detector:
    """A copy of the detector, in eval mode, out of torch.compile and the wrappers of parallel training.

    Raises:
        ModelError: it is no `Detector`.
    """
    plain, _ = unwrapped(model)
    if not isinstance(plain, Detector):
        raise ModelError(
            f"The model is a {type(plain).__name__}, which does not say what its labels mean; wrap it "
            "as `Detector(net, label_ids)`."
        )
    detector = copied(plain).eval().requires_grad_(True)
    assert isinstance(detector, Detector)
    return detector


def epoch_of(
    pictures: Pictures, size: int, generator: torch.Generator, *, flip: bool = False
) -> Iterator[Pictures]:
    """All pictures once in batches, in a new order.

    Args:
        flip: whether half of them are mirrored, boxes too.
    """
    for rows in shuffled(len(pictures), size, generator):
        batch = pictures.at(rows.tolist())
        if flip:
            coins = torch.rand(len(batch), generator=generator) < 0.5
            batch = Pictures(*zip(*map(_mirrored, batch.images, batch.labels, coins), strict=True))
        yield batch


def _mirrored(image: Tensor, target: Target, coin: Tensor) -> tuple[Tensor, Target]:
    """A picture with its boxes as in a mirror, if the coin says so."""
    if not coin:
        return image, target
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    width = image.shape[-1]
    boxes = torch.stack([width - x1, y0, width - x0, y1], 1)
    return image.flip(-1), {"boxes": boxes, "labels": target["labels"]}


def sgd(detector: Detector, config: DetectorConfig) -> torch.optim.SGD:
    """The optimiser of all weights."""
    return torch.optim.SGD(
        weights_of(detector),
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def learn_statistics(detector: Detector) -> None:
    """Let the running statistics of norms follow the pictures."""
    for module in detector.modules():
        if isinstance(module, _NormBase):
            module.train()


def loss_of(losses: dict[str, Tensor]) -> Tensor:
    """What a detector learns: the sum of its training losses."""
    return torch.stack(list(losses.values())).sum()
