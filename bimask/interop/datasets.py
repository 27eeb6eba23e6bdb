"""The data sets that BackdoorBench knows: its constants, and its order of their clean images.

Source: the conventions of github.com/SCLBD/BackdoorBench. Positions in its files count the images in
the order that is kept here: torchvision's for CIFAR and MNIST, the annotation files' for GTSRB, and
sorted folders for Tiny ImageNet and for a folder of one's own.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bimask.data import ImageData
from bimask.errors import InteropError
from bimask.files.pictures import class_pictures, opened_picture
from bimask.files.png import MODES, check_extent

UNREADABLE = (OSError, RuntimeError, ValueError, LookupError)
Sample = tuple[Any, int]  # a file or a PIL picture, and its label


@dataclass(frozen=True)
class Conventions:
    """What BackdoorBench takes as given for a data set.

    Attributes:
        classes: number of them.
        side: of its square images, in pixels.
        mean, std: of its normalisation, one value a channel.
    """

    classes: int
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


NO_MEAN, NO_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
DATASETS: dict[str, Conventions] = {
    "celeba": Conventions(8, 64, NO_MEAN, NO_STD),
    "cifar10": Conventions(10, 32, (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": Conventions(100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "gtsrb": Conventions(43, 32, NO_MEAN, NO_STD),
    "imagenet": Conventions(1000, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mnist": Conventions(10, 28, (0.5,), (0.5,)),
    "tiny": Conventions(200, 64, (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}


def read_clean(
    name: str, root: str | Path, *, size: tuple[int, int], channels: int, train: bool = False
) -> ImageData:
    """Clean images in BackdoorBench's order, at the size its models see.

    Args:
        name: one of `DATASETS`.
        root: the folder BackdoorBench calls `data_path`, or `imagefolder:PATH` for class folders in
            PATH/test (and PATH/train), or in PATH itself.
        size: height and width; pictures of another are resized bilinearly, as PIL does it.
        train: the training split in place of the test split.

    Raises:
        InteropError: nothing there, unreadable, or a layout that is not known.
    """
    split = "training" if train else "test"
    try:
        if str(root).startswith("imagefolder:"):
            path = Path(str(root).removeprefix("imagefolder:"))
            part = path / ("train" if train else "test")
            samples, classes = _folder(part if part.is_dir() else path)
        elif name in LAYOUTS:
            samples, classes = LAYOUTS[name](Path(root), train)
        else:
            raise InteropError(
                f"The layout of {name} is not read; give its {split} images as imagefolder:PATH."
            )
        return _decoded(samples, classes, size, channels)
    except UNREADABLE as error:
        first = str(error).splitlines()[0] if str(error) else ""
        raise InteropError(
            f"The clean {split} images of {name} cannot be read from {root} ({type(error).__name__}: "
            f"{first}); give the folder that holds them with --clean-data."
        ) from error


def _decoded(
    samples: list[Sample], classes: tuple[str, ...], size: tuple[int, int], channels: int
) -> ImageData:
    height, width = size
    check_extent(len(samples), channels, height, width)
    images = torch.empty(len(samples), channels, height, width, dtype=torch.uint8)
    for row, (source, _) in enumerate(samples):
        with source if isinstance(source, Image.Image) else opened_picture(source) as picture:
            fitting = picture.convert(MODES[channels])
            if fitting.size != (width, height):
                fitting = fitting.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.array(fitting)
        images[row] = torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1)
    return ImageData(images, torch.tensor([label for _, label in samples]), classes)


def _folder(path: Path) -> tuple[list[Sample], tuple[str, ...]]:
    classes, samples = class_pictures(path)
    return list(samples), classes


def _cifar(name: str) -> Callable[[Path, bool], tuple[list[Sample], tuple[str, ...]]]:
    def read(root: Path, train: bool) -> tuple[list[Sample], tuple[str, ...]]:
        from torchvision import datasets

        # torchvision checks the digests of its files, which are pickles, before it opens them
        found = getattr(datasets, name)(str(root), train)
        pictures = [Image.fromarray(image) for image in found.data]
        return list(zip(pictures, found.targets, strict=True)), tuple(found.classes)

    return read


def _mnist(root: Path, train: bool) -> tuple[list[Sample], tuple[str, ...]]:
    from torchvision.datasets import MNIST

    found = MNIST(str(root), train)
    pictures = [Image.fromarray(image.numpy()) for image in found.data]
    return list(zip(pictures, found.targets.tolist(), strict=True)), tuple(found.classes)


def _gtsrb(root: Path, train: bool) -> tuple[list[Sample], tuple[str, ...]]:
    folders = [root / "Train" / f"{label:05d}" for label in range(43)]
    tables = [folder / f"GT-{folder.name}.csv" for folder in folders]
    if not train:
        tables = [root / "Test" / "GT-final_test.csv"]
    samples: list[Sample] = []
    for table in tables:
        with open(table, newline="") as lines:
            rows = list(csv.reader(lines, delimiter=";"))[1:]  # the first row names the columns
        samples += [(table.parent / Path(row[0]).name, int(row[7])) for row in rows]
    return samples, tuple(str(label) for label in range(43))


def _tiny(root: Path, train: bool) -> tuple[list[Sample], tuple[str, ...]]:
    inner = root / "tiny-imagenet-200"
    return _folder((inner if inner.is_dir() else root) / ("train" if train else "val"))


LAYOUTS: dict[str, Callable[[Path, bool], tuple[list[Sample], tuple[str, ...]]]] = {
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "gtsrb": _gtsrb,
    "mnist": _mnist,
    "tiny": _tiny,
}
