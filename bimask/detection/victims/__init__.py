"""Victims that are detectors: trained on poisoned pictures, saved with scores, loaded by digest."""

from bimask.detection.victims.files import DetectionVictim, load_victim, save_victim
from bimask.detection.victims.spec import DetectorSpec
from bimask.detection.victims.train import EpochLog, obtain_victim, train_victim

__all__ = [
    "DetectionVictim",
    "DetectorSpec",
    "EpochLog",
    "load_victim",
    "obtain_victim",
    "save_victim",
    "train_victim",
]
