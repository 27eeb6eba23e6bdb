"""Detectors, the second task: pictures with boxes, attacks on them, and what repairs a detector."""

from bimask.detection.defences import DEFENCES
from bimask.detection.metrics import DetectionScores, DetectionSets, evaluate
from bimask.detection.nets.detector import Detector
from bimask.detection.nets.matched import Matched, matched
from bimask.detection.objects import DetectionData, DetectionSplits, Found, Target

__all__ = [
    "DEFENCES",
    "DetectionData",
    "DetectionScores",
    "DetectionSets",
    "DetectionSplits",
    "Detector",
    "Found",
    "Matched",
    "Target",
    "evaluate",
    "matched",
]
