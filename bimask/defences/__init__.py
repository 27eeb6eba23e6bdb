"""What takes a backdoor out of a model: defences by name, under one contract (`base.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bimask.defences.base import Defence
from bimask.defences.clipping.unit import Unit
from bimask.defences.finetuning.fip import Fip
from bimask.defences.finetuning.fst import Fst
from bimask.defences.finetuning.ft import Ft
from bimask.defences.finetuning.ft_sam import FtSam
from bimask.defences.finetuning.nad import Nad
from bimask.defences.ims.defence import Ims
from bimask.defences.pruning.anp import Anp
from bimask.defences.pruning.awm import Awm
from bimask.defences.pruning.bnp import Bnp
from bimask.defences.pruning.clp import Clp
from bimask.defences.pruning.fine_pruning import FinePruning
from bimask.defences.pruning.fmp import Fmp
from bimask.defences.pruning.nft import Nft
from bimask.defences.pruning.onp_like import OnpLike
from bimask.defences.pruning.rnp import Rnp
from bimask.defences.settings import DefenceConfig
from bimask.defences.unlearning.bti_dbf import BtiDbf
from bimask.defences.unlearning.ibau import Ibau
from bimask.defences.unlearning.neural_cleanse import NeuralCleanse
from bimask.defences.unlearning.npd import Npd
from bimask.defences.unlearning.sau import Sau
from bimask.defences.unlearning.strategic import Strategic
from bimask.errors import SettingError
from bimask.files.bounded import read_yaml

DEFENCES: dict[str, Defence[Any]] = {
    defence.name: defence
    for defence in (
        Ims(),
        FinePruning(),
        Anp(),
        Rnp(),
        Clp(),
        Bnp(),
        Awm(),
        Nft(),
        Fmp(),
        OnpLike(),
        Ft(),
        FtSam(),
        Fst(),
        Nad(),
        Ibau(),
        Sau(),
        Npd(),
        NeuralCleanse(),
        BtiDbf(),
        Fip(),
        Strategic(),
        Unit(),
    )
}


def defence_named(name: object, known: Mapping[str, Defence[Any]] = DEFENCES) -> Defence[Any]:
    """A defence of `known`.

    Raises:
        SettingError: there is none of that name.
    """
    if not isinstance(name, str) or name not in known:
        raise SettingError(f"There is no defence {name!r}; known are {', '.join(known)}.")
    return known[name]


def settings_from(path: str | Path, known: Mapping[str, Defence[Any]] = DEFENCES) -> DefenceConfig:
    """The settings in a YAML file, such as a study's best.yaml: of the defence it names, or the first
    of `known`.

    Raises:
        SettingError: no such file, not a mapping, no such defence, or settings that do not fit, all
            named.
    """
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise SettingError(f"Cannot read the configuration {path}: {error}.") from error
    first = next(iter(known))
    name = content.get("defence", first) if isinstance(content, dict) else first
    found: DefenceConfig = defence_named(name, known).config.from_yaml(path)
    return found
