"""How large the pictures of a data set are, and how many there are, without having them."""

from __future__ import annotations

from dataclasses import dataclass

from bimask.data.loaders import FOLDER, load_data


@dataclass(frozen=True)
class Shape:
    """Of a data set's training pictures.

    Attributes:
        channels, size: of a picture; it is square.
        classes: how many there are.
        images: for training, without those that are held out.
    """

    channels: int
    size: int
    classes: int
    images: int


# As `load_data` brings and splits them.
SHAPES = {
    "cifar10": Shape(3, 32, 10, 45_000),
    "digits": Shape(1, 16, 10, 897),
    "gtsrb": Shape(3, 32, 43, 23_976),
    "tiny-imagenet": Shape(3, 64, 200, 90_000),
}


def shape_of(name: str, image_size: int | None = None) -> Shape:
    """The shape of a data set by name; a folder of pictures is read for it.

    Raises:
        DataError: a folder that cannot be read.
    """
    if name.startswith(FOLDER):
        train = load_data(name, image_size=image_size).train
        channels, size = train.images.shape[1], train.images.shape[-1]
        return Shape(channels, size, train.num_classes, len(train))
    known = SHAPES[name]
    return Shape(known.channels, image_size or known.size, known.classes, known.images)
