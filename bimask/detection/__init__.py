"""Detectors, the second task: pictures with boxes, attacks on them, and what repairs a detector."""

from bimask.detection.cleaned import load_cleaned
from bimask.detection.defences import DEFENCES
from bimask.detection.metrics import DetectionScores, DetectionSets, evaluate
from bimask.detection.nets.detector import Detector
from bimask.detection.nets.matched import Matched, matched
from bimask.detection.objects import DetectionData, DetectionSplits, Found, Target
from bimask.detection.purify import purify
from bimask.detection.suspects import load_suspect

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
    "load_cleaned",
    "load_suspect",
    "matched",
    "purify",
]
