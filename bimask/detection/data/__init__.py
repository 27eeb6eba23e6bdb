"""Pictures with boxes by name: digits on canvases, annotations in COCO's JSON and VOC's XML."""

from bimask.detection.data.canvases import canvases, digit_canvases
from bimask.detection.data.loading import LOADERS, check_data, files_digest, is_files, load_detection

__all__ = [
    "LOADERS",
    "canvases",
    "check_data",
    "digit_canvases",
    "files_digest",
    "is_files",
    "load_detection",
]
