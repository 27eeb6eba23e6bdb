"""Images with labels, data sets by name, the fixed splits."""

from bimask.data.images import ImageData, Splits, augment
from bimask.data.loaders import LOADERS, cache_folder, load_data

__all__ = ["LOADERS", "ImageData", "Splits", "augment", "cache_folder", "load_data"]
