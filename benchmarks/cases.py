"""Victims, the defender's images and the settings that the benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bimask.defences.ims.config import PurifyConfig
from bimask.masking.masks import MaskSet, fold
from bimask.metrics import EvalSets, Scores, evaluate
from bimask.victims import Victim, VictimSpec, obtain_victim

FOLDER = Path("outputs/benchmarks")  # beside the studies: victims and nothing else


@dataclass(frozen=True)
class Goal:
    """What a purified model must hold on `test`."""

    attack_success: float
    accuracy_drop: float
    recovery: float

    def met(self, scores: Scores, before: Scores) -> bool:
        drop = before.clean_accuracy - scores.clean_accuracy
        return (
            scores.attack_success <= self.attack_success
            and drop <= self.accuracy_drop + 1e-9
            and scores.recovery >= self.recovery
        )


GOALS = {
    "digits-badnets": Goal(0.03, 0.02, 0.90),
    "digits-blended": Goal(0.05, 0.025, 0.0),
    "cifar10-jpeg-badnets": Goal(0.03, 1.0, 0.75),  # recovery bounds what clean accuracy may lose
}


@dataclass(frozen=True)
class BenchCase:
    """A victim with its data."""

    name: str
    victim: Victim
    goal: Goal
    _train: Any
    test: EvalSets

    def clean(self, seed: int, per_class: int = 10) -> Tensor:
        """The defender's images, 100 of them: (100, C, H, W) in [0, 1]."""
        images: Tensor = self._train.clean_subset(per_class, seed=seed).floats()
        return images

    def scores(self, masks: MaskSet) -> Scores:
        """On `test`."""
        return evaluate(fold(self.victim.model, masks), self.test)


def digits(attack: str) -> BenchCase:
    """The victim of `make study`, or its Blended sister."""
    settings: dict[str, dict[str, Any]] = {
        "badnets": {"name": "badnets", "size": 3},
        "blended": {"name": "blended"},
    }
    spec = VictimSpec(
        attack=settings[attack], min_clean_accuracy=0.95, min_attack_success=0.9, net="small_resnet"
    )
    return _case(f"digits-{attack}", spec)


def cifar(folder: Path, attack: str = "badnets") -> BenchCase:
    """PreActResNet18 of width 16 on CIFAR-10 pictures in `folder`/train and /test."""
    spec = VictimSpec(
        dataset=f"imagefolder:{folder}",
        net="preactresnet18",
        width=16,
        attack={"name": attack},
        epochs=12,
        shift=2,
        precision="bfloat16",
    )
    return _case(f"cifar10-jpeg-{attack}", spec)


def _case(name: str, spec: VictimSpec) -> BenchCase:
    victim = obtain_victim(
        spec,
        FOLDER / "victims",
        on_epoch=lambda log: print(f"{name}: epoch {log.epoch} of {log.epochs}", flush=True),
    )
    data = spec.load_data()
    return BenchCase(name, victim, GOALS[name], data.train, victim.eval_sets(data, "test"))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def published(rounds: dict[str, int], **changes: Any) -> PurifyConfig:
    """The published settings with so many rounds a stage, without early stopping."""
    limits = {f"{stage}_rounds": rounds.get(stage, 0) for stage in ("initialise", "minimise", "select")}
    return PurifyConfig.profile("paper", patience=None, **limits, **changes)


def fast(**changes: Any) -> PurifyConfig:
    return PurifyConfig.profile("fast", **changes)
