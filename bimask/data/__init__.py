"""Images with labels, data sets by name, the fixed splits."""

from bimask.data.images import ImageData, Splits, augment
from bimask.data.loaders import FOLDER, LOADERS, cache_folder, load_data, pictures_digest
from bimask.data.shapes import SHAPES, Shape, shape_of

__all__ = [
    "FOLDER",
    "LOADERS",
    "SHAPES",
    "ImageData",
    "Shape",
    "Splits",
    "augment",
    "cache_folder",
    "load_data",
    "pictures_digest",
    "shape_of",
]
