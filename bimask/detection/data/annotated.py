"""Pictures in files with their objects, whatever form the annotations have: the one reader of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bimask.data.pictures import DataWarning, picture_size, read_picture
from bimask.detection.objects import DetectionData, Target
from bimask.errors import DataError, warn
from bimask.nets.weights import file_sha256

MAX_BYTES = 4 * 2**30  # of all pictures in memory
LEAST_SIDE = 1.0  # pixels of a box


@dataclass(frozen=True)
class Annotated:
    """A picture in a file with its objects.

    Attributes:
        name: by which pictures are told apart, whatever the folder they are in.
        boxes: x0 y0 x1 y1 in the file's own pixels; they may reach over its edges.
        labels: of each box.
    """

    name: str
    picture: Path
    boxes: tuple[tuple[float, float, float, float], ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Listing:
    """What annotations say, before a picture is read.

    Attributes:
        source: the file or folder of the annotations, for messages.
        ids: what the file calls each class, where that is not its name.
        left_out: objects that are not to be learned, and what they are, such as "3 crowd regions".
    """

    source: Path
    pictures: tuple[Annotated, ...]
    classes: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    ids: tuple[int | str, ...] = ()

    @property
    def digest(self) -> str:
        """64 hex digits of pictures, boxes, labels and classes, wherever the files are.

        Raises:
            VictimError: a picture cannot be read.
        """
        content = hashlib.sha256("|".join(self.classes).encode())
        for one in sorted(self.pictures, key=lambda one: one.name):
            content.update(f"{one.name}|{one.boxes}|{one.labels}".encode())
            content.update(file_sha256(one.picture).encode())
        return content.hexdigest()


def read_listing(listing: Listing, image_size: int | None) -> DetectionData:
    """Decode pictures; boxes are cut at their edges, and those without a whole pixel left out.

    What is left out is told in a warning.

    Args:
        image_size: pictures with a longer side are shrunk until it has so many pixels.

    Raises:
        DataError: a picture cannot be read, or all together are too large for memory.
    """
    images, targets, total, empty = [], [], 0, 0
    for one in listing.pictures:
        height, width = picture_size(one.picture)
        scale = 1.0 if image_size is None else min(1.0, image_size / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        total += 3 * size[0] * size[1]
        if total > MAX_BYTES:
            raise DataError(
                f"The pictures of {listing.source} take more than {MAX_BYTES >> 30} GiB of memory; "
                "give a smaller `image_size`, or fewer pictures."
            )
        images.append(read_picture(one.picture, 3, None if scale == 1 else size))
        target, lost = _target(one, size, (size[1] / width, size[0] / height))
        targets.append(target)
        empty += lost
    told = [*listing.left_out, *([f"{empty} boxes without a whole pixel"] if empty else [])]
    if told:
        warn(f"{listing.source}: {' and '.join(told)} were left out.", DataWarning)
    return DetectionData(tuple(images), tuple(targets), listing.classes)


def _target(one: Annotated, size: tuple[int, int], scale: tuple[float, float]) -> tuple[Target, int]:
    """A picture's objects in its pixels in memory, and how many boxes were left out."""
    boxes = torch.tensor(one.boxes, dtype=torch.float64).view(-1, 4) * torch.tensor(
        [*scale, *scale], dtype=torch.float64
    )
    limit = torch.tensor([size[1], size[0]] * 2, dtype=torch.float64)
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    whole: Tensor = ((boxes[:, 2:] - boxes[:, :2]) >= LEAST_SIDE).all(1)
    labels = torch.tensor(one.labels, dtype=torch.int64)
    return {"boxes": boxes[whole].float(), "labels": labels[whole]}, int((~whole).sum())
