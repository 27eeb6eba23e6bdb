"""Take backdoors out of trained networks with invertible pruning masks."""

from bimask.attacks import ATTACKS, Attack, build_attack
from bimask.data import ImageData, Splits, load_data
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.population import PopulationPurifier
from bimask.defences.ims.result import PurifyResult, RoundLog
from bimask.defences.ims.synthesis import TriggerSynthesizer
from bimask.defences.purify import purify
from bimask.errors import BimaskError
from bimask.masking.masks import InvertibleMask, MaskSet, fold, masked_forward
from bimask.metrics import EvalSets, Scores, evaluate
from bimask.nets import NETS, Normalised
from bimask.victims import Victim, VictimSpec, load_victim, obtain_victim, train_victim

__all__ = [
    "ATTACKS",
    "NETS",
    "Attack",
    "BimaskError",
    "EvalSets",
    "ImageData",
    "InvertibleMask",
    "MaskSet",
    "Normalised",
    "PopulationPurifier",
    "PurifyConfig",
    "PurifyResult",
    "RoundLog",
    "Scores",
    "Splits",
    "TriggerSynthesizer",
    "Victim",
    "VictimSpec",
    "build_attack",
    "evaluate",
    "fold",
    "load_data",
    "load_victim",
    "masked_forward",
    "obtain_victim",
    "purify",
    "train_victim",
]
