"""One choice on one victim that no trial saw, scored on `test`."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from typing import cast

import torch

from bimask.defences.purify import defend
from bimask.defences.settings import DefenceConfig
from bimask.metrics import evaluate
from bimask.victims import Victim, VictimSpec
from study.spec.comparison import Part
from study.store.comparison import JudgedRecord
from study.store.schema import SCHEMA, VictimScores


def attack_of(spec: VictimSpec) -> str:
    """For people: the attack's name, and how it relabels where that is not to one class."""
    if spec.is_control:
        return "clean"
    rule = str(spec.attack.get("label_rule", "all_to_one"))
    return spec.attack_name if rule == "all_to_one" else f"{spec.attack_name}, {rule.replace('_', ' ')}"


@dataclass(frozen=True)
class Judgement:
    """A run of a comparison.

    Attributes:
        entry: the row of the comparison.
        budget: clean images of every class.
        victim: its digest.
        seed: of the defence and of the clean images.
    """

    entry: str
    settings: DefenceConfig
    budget: int
    part: Part
    victim: str
    seed: int

    @property
    def key(self) -> tuple[str, int, str, int]:
        return self.entry, self.budget, self.victim, self.seed

    def about(self, victim: Victim) -> JudgedRecord:
        """The record of the run before it has run."""
        return {
            "schema": SCHEMA,
            "entry": self.entry,
            "budget": self.budget,
            "part": self.part,
            "victim": self.victim,
            "attack": attack_of(victim.spec),
            "victim_seed": victim.spec.seed,
            "seed": self.seed,
            "before": cast(VictimScores, asdict(victim.scores["test"])),
        }


def judge(job: Judgement, victim: Victim, *, device: str = "cpu") -> JudgedRecord:
    """Defend a victim, and score it on `test`: a record as JSON types.

    Raises:
        BimaskError: the defence refuses the victim, or came to nothing.
    """
    splits = victim.spec.load_data()
    clean = splits.train.clean_subset(job.budget, seed=job.seed)
    model = copy.deepcopy(victim.model).to(device)
    generator = torch.Generator().manual_seed(job.seed)
    images, labels = clean.floats().to(device), clean.labels.to(device)
    started = time.perf_counter()
    result = defend(model, images, job.settings, labels=labels, generator=generator)
    seconds = time.perf_counter() - started
    before = victim.scores["test"]
    scores = evaluate(result.model(), victim.eval_sets(splits, "test").to(device))
    return {
        **job.about(victim),
        "test": cast(VictimScores, asdict(scores)),
        "arr": scores.arr(before),
        "rdr": scores.rdr(before),
        "der": scores.der(before),
        "seconds": seconds,
        "forward": result.passes.forward,
        "backward": result.passes.backward,
        "own": dict(result.numbers),
    }
