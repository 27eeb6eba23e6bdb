"""Detectors, the second task: pictures with boxes, attacks on them, and what repairs a detector."""

from bimask.detection.objects import DetectionData, DetectionSplits, Found, Target

__all__ = ["DetectionData", "DetectionSplits", "Found", "Target"]
