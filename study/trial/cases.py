"""What a trial needs of a victim, and what it ends with there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bimask.defences.base import CleanData, Defence, DefenceResult
from bimask.devices import moved
from bimask.metrics import CleanScores, CleanSet, EvalSets, Scores
from bimask.tasks import CLASSIFICATION, Task, defence_of
from study.spec.config import StudyConfig
from study.spec.suspect import Subject
from study.store.schema import VictimScores


@dataclass(frozen=True)
class Case:
    """What a trial needs of one victim; it holds `val` and never sees `test`.

    Attributes:
        name: of the victim in this study.
        victim: with its own scores; or a suspect.
        clean: the defender's images, (N, C, H, W) float in [0, 1].
        val: evaluation sets to choose on; they know the true trigger (`oracle` selection), but for a
            suspect, of which nobody does.
        repeat: which of the victim's runs in a trial this is: each has its own seed and images.
        probe: what a purified model is asked with, without the attack, made by `Task.probe`; None asks
            nothing.
        prepared: defence -> what it made of the victim beforehand; none of those that need nothing.
        labels: of `clean`, handed to defences that declare them alone.
        task: what the victim is one of.
    """

    name: str
    victim: Subject
    clean: Tensor
    val: EvalSets | CleanSet
    repeat: int = 0
    probe: Any = None
    prepared: Mapping[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    task: Task = CLASSIFICATION

    @classmethod
    def of(cls, name: str, victim: Subject, config: StudyConfig, repeat: int = 0) -> Case:
        """The case of a victim in a study: its clean subset is drawn from the training split."""
        splits = victim.load_data()
        seed = config.seed + repeat
        clean = splits.train.clean_subset(config.clean_images_per_class, seed=seed)
        return cls(
            name,
            victim,
            clean.floats(),
            victim.eval_sets(splits, "val"),
            repeat,
            labels=clean.labels,
            task=config.task,
        )

    def to(self, device: torch.device | str) -> Case:
        """The same with its images on another device; the victim stays."""
        probe = None if self.probe is None else self.probe.to(device)
        prepared = {name: one.to(device) for name, one in self.prepared.items()}
        clean, labels = moved((self.clean, self.labels), device)
        val = self.val.to(device)
        return replace(self, clean=clean, val=val, probe=probe, prepared=prepared, labels=labels)

    def data(self, defence: Defence[Any]) -> CleanData:
        """What a defence is handed: labels only where it declares that it needs them."""
        return CleanData(self.clean, self.labels if defence.needs_labels else None)

    def ask(self, model: nn.Module, result: DefenceResult) -> dict[str, float]:
        """What the probe says of a defended model and its twin, by name; nothing without a probe."""
        if self.probe is None or self.task.probe is None:
            return {}
        twin = defence_of(result.config).twin(model, result.tensors, result.config)
        return self.task.probe.ask(self.probe, result.model(), twin)

    @property
    def before(self) -> float:
        """The victim's own clean quality on `val`."""
        return self.task.quality_of(self.victim.scores["val"])

    @property
    def key(self) -> str:
        """Names the run: the victim's name, and from the second run on which one it is."""
        return self.name if self.repeat == 0 else f"{self.name}.{self.repeat}"


@dataclass(frozen=True)
class CaseResult:
    """What one run of a trial ended with.

    Attributes:
        name: of the victim.
        result: of the defence.
        tensors: what the defended model is restored from, on the CPU.
        numbers: what objectives and constraints are made of, see `numbers_of`.
        evidence: what the case's probe says of the defended model, by name.
    """

    name: str
    scores: Scores | CleanScores
    result: DefenceResult
    tensors: dict[str, Tensor]
    numbers: dict[str, float]
    evidence: dict[str, float] = field(default_factory=dict)

    def everything(self) -> VictimScores:
        """Scores, numbers and evidence under their names."""
        return cast(VictimScores, asdict(self.scores) | self.numbers | self.evidence)
