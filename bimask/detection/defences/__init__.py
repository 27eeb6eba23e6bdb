"""What repairs a detector: defences by name, under the contract of `bimask.defences`."""

from __future__ import annotations

from typing import Any

from bimask.detection.defences.adversarial import Adversarial
from bimask.detection.defences.base import DetectorDefence
from bimask.detection.defences.finetuning import DetectorFt, DetectorFtSam
from bimask.detection.defences.ims import DetectorIms
from bimask.detection.defences.soft_branch import SoftBranch

DEFENCES: dict[str, DetectorDefence[Any]] = {
    defence.name: defence
    for defence in (SoftBranch(), Adversarial(), DetectorFt(), DetectorFtSam(), DetectorIms())
}
