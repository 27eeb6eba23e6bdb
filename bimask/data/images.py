"""Images as one uint8 tensor with labels; the defender's clean subset.

Batching is indexing. Everything is decoded once and stays resident on its device.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bimask.devices import upload
from bimask.errors import DataError


@dataclass(frozen=True)
class ImageData:
    """Images with labels.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64 in [0, num_classes).
        classes: name of every class.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(
                f"Images must be uint8 (N, C, H, W), got {self.images.dtype} "
                f"{tuple(self.images.shape)}."
            )
        if self.labels.shape != self.images.shape[:1]:
            raise DataError(f"{len(self.images)} images need as many labels, got {self.labels.shape}.")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def digest(self) -> str:
        """Sixteen hex digits of images and labels, in their order."""
        content = hashlib.sha256(f"{tuple(self.images.shape)}".encode())
        for tensor in (self.images, self.labels):
            content.update(tensor.cpu().contiguous().numpy().data)
        return content.hexdigest()[:16]

    def floats(self, index: Tensor | slice = slice(None)) -> Tensor:
        """The images at `index` as float32 in [0, 1]."""
        return self.images[index].float() / 255

    def subset(self, index: Tensor) -> ImageData:
        """The images at `index` (integers, or a mask of N booleans), in its order."""
        return ImageData(self.images[index], self.labels[index], self.classes)

    def to(self, device: torch.device | str) -> ImageData:
        """The same on another device."""
        return ImageData(self.images.to(device), self.labels.to(device), self.classes)

    def clean_subset(self, samples_per_class: int, *, seed: int) -> ImageData:
        """`samples_per_class` images of every class, drawn by `seed`, ordered by class.

        Raises:
            DataError: naming the smallest class, if it has fewer images than that.
        """
        if samples_per_class < 1:
            raise DataError(f"`samples_per_class >= 1` must hold, but got {samples_per_class}.")
        counts = torch.bincount(self.labels, minlength=self.num_classes)
        smallest = int(counts.argmin())
        if counts[smallest] < samples_per_class:
            raise DataError(
                f"{samples_per_class} clean images a class were asked for, but class "
                f"{self.classes[smallest]!r} has {counts[smallest]}; ask for at most that many."
            )
        # a stream of its own: with the one that poisoning draws from, equal seeds would hand the
        # defender just the images that were poisoned
        stream = np.random.default_rng([seed, 1])
        order = torch.from_numpy(stream.permutation(len(self)))
        labels = self.labels.cpu()[order]
        picks = [order[labels == c][:samples_per_class] for c in range(self.num_classes)]
        return self.subset(torch.cat(picks))


@dataclass(frozen=True)
class Splits:
    """A dataset: `train` for the victim and the defender, `val` to choose on, `test` to report on."""

    train: ImageData
    val: ImageData
    test: ImageData


def augment(
    images: Tensor, *, shift: int = 0, flip: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Shift every image by its own offset (edges repeated) and flip half of them.

    Args:
        images: (N, C, H, W).
        shift: largest offset in pixels, both ways.
        generator: of the images' device, or of the CPU; None is torch's own.
    """
    n, _, height, width = images.shape
    source = images.device if generator is None else generator.device
    if flip:
        mirrored = torch.rand(n, 1, 1, 1, device=source, generator=generator) < 0.5
        images = torch.where(upload(mirrored, images), images.flip(3), images)
    if shift:
        padded = F.pad(images, [shift] * 4, mode="replicate")
        offset = torch.randint(0, 2 * shift + 1, (2, n, 1), device=source, generator=generator)
        offset = upload(offset, images)
        rows = (offset[0] + torch.arange(height, device=images.device)).view(n, 1, height, 1)
        columns = (offset[1] + torch.arange(width, device=images.device)).view(n, 1, 1, width)
        picture = torch.arange(n, device=images.device).view(n, 1, 1, 1)
        channel = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
        images = padded[picture, channel, rows, columns]
    return images.contiguous(memory_format=torch.channels_last)
