"""What detectors are worth, clean and under attack."""

from bimask.detection.metrics.average_precision import AveragePrecision, average_precision
from bimask.detection.metrics.scores import (
    DetectionScores,
    DetectionSets,
    TriggeredObjects,
    detect,
    evaluate,
)

__all__ = [
    "AveragePrecision",
    "DetectionScores",
    "DetectionSets",
    "TriggeredObjects",
    "average_precision",
    "detect",
    "evaluate",
]
