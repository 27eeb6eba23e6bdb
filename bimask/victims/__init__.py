"""Victims: models trained on poisoned data, saved with their scores, loaded by digest."""

from bimask.victims.files import Victim, load_victim, save_victim
from bimask.victims.spec import VictimSpec
from bimask.victims.suite import VictimSuite, load_suite
from bimask.victims.train import EpochLog, obtain_victim, open_victim, train_victim

__all__ = [
    "EpochLog",
    "Victim",
    "VictimSpec",
    "VictimSuite",
    "load_suite",
    "load_victim",
    "obtain_victim",
    "open_victim",
    "save_victim",
    "train_victim",
]
