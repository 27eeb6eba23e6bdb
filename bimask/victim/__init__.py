"""Victims: models trained on poisoned data, saved with their scores, loaded by digest."""

from bimask.victim.files import Victim, load_victim, save_victim
from bimask.victim.spec import VictimSpec
from bimask.victim.train import EpochLog, obtain_victim, train_victim

__all__ = [
    "EpochLog",
    "Victim",
    "VictimSpec",
    "load_victim",
    "obtain_victim",
    "save_victim",
    "train_victim",
]
