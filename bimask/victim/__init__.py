"""Victims: models trained on poisoned data, saved with their scores, loaded by digest."""

from bimask.victim.files import Victim, load_victim, save_victim
from bimask.victim.spec import VictimSpec
from bimask.victim.suite import VictimSuite, load_suite
from bimask.victim.train import EpochLog, obtain_victim, open_victim, train_victim

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
