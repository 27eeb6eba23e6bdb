"""Images with labels, data sets by name, the fixed splits."""

from bimask.data.images import ImageData, Splits, augment
from bimask.data.loaders import FOLDER, LOADERS, cache_folder, load_data, pictures_digest

__all__ = [
    "FOLDER",
    "LOADERS",
    "ImageData",
    "Splits",
    "augment",
    "cache_folder",
    "load_data",
    "pictures_digest",
]
