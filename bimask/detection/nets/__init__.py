"""Detectors by name, and the one face that all of them have."""

from bimask.detection.nets.detector import Detector, label_ids_of
from bimask.detection.nets.named import DETECTORS, build_detector, check_detector, require_answers
from bimask.detection.nets.small_fcos import small_fcos

__all__ = [
    "DETECTORS",
    "Detector",
    "build_detector",
    "check_detector",
    "label_ids_of",
    "require_answers",
    "small_fcos",
]
