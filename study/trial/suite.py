"""The victims of a study by their roles, and the confirmation of a choice on all of them.

Trials see the tuning victims alone, on `val`. After the choice every victim of the suite is purified
anew with the chosen configuration, several times, each time with a seed and clean images that no
trial had, and scored on `test`: what the choice is worth against attacks that it never saw, and what
it costs a model without a backdoor.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from bimask.defences.settings import DefenceConfig
from bimask.devices import moved
from bimask.tasks import defend
from bimask.victims import Victim
from study.spec.config import StudyConfig
from study.spec.directions import SCORES
from study.spec.objectives import Spread, known_scores, spread
from study.spec.suspect import Subject
from study.store.schema import (
    SCHEMA,
    Configuration,
    Confirmation,
    ConfirmRecord,
    Role,
    Spreads,
    VictimScores,
)
from study.trial.cases import Case

CONFIRMED = (*SCORES, "accuracy_drop")


def roles(config: StudyConfig) -> dict[str, Role]:
    """Victim name -> its role, in the order of the suite."""
    found: list[Role] = [
        *["tuning"] * len(config.victims),  # type: ignore[list-item]
        *["held_out"] * len(config.held_out),  # type: ignore[list-item]
        *["control"] * len(config.controls),  # type: ignore[list-item]
    ]
    return dict(zip(config.suite_names(), found, strict=True))


def cases_of(config: StudyConfig, victims: Mapping[str, Subject]) -> list[Case]:
    """The runs of a trial in the order in which it meets them.

    Every victim's first run comes before any second one. Where trials are stopped between victims, the
    cheap ones come first, by the operations of one forward pass; else the order is the file's.
    """
    names = config.victim_names()
    if config.early_stopping is not None and config.early_stopping.dominated:
        names = sorted(names, key=lambda name: operations(victims[name]))
    return [
        Case.of(name, victims[name], config, repeat)
        for repeat in range(config.repeats)
        for name in names
    ]


def operations(victim: Subject) -> int:
    """Floating point operations of one forward pass of one image."""
    image = victim.load_data().val.floats()[:1]
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        copy.deepcopy(victim.model)(image)
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Job:
    """One purification of the confirmation.

    Attributes:
        configuration: "chosen" or "paper_defaults".
        seed: of the defence and of the clean images.
    """

    configuration: Configuration
    settings: DefenceConfig
    victim: str
    role: Role
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.configuration, self.victim, self.seed

    @property
    def about(self) -> ConfirmRecord:
        """The record of the job before it has run."""
        return {
            "schema": SCHEMA,
            "configuration": self.configuration,
            "victim": self.victim,
            "role": self.role,
            "seed": self.seed,
        }

    def failed(self, reason: str) -> ConfirmRecord:
        """The record of the job when it came to nothing."""
        return {**self.about, "reason": reason}


def jobs_of(config: StudyConfig, settings: Mapping[Configuration, DefenceConfig]) -> list[Job]:
    """Everything that the confirmation runs.

    Args:
        settings: "chosen" and "paper_defaults", or one of them -> what to purify with.
    """
    asked = config.confirmation
    if asked is None:
        return []
    counts: dict[Configuration, int | None] = {
        "chosen": asked.seeds,
        "paper_defaults": asked.paper_seeds,
    }
    first = config.seed + config.repeats  # the seeds before it are those of the trials
    return [
        Job(configuration, one, victim, role, seed)
        for configuration, one in settings.items()
        for victim, role in roles(config).items()
        for seed in range(first, first + _count(counts[configuration], asked.seeds))
    ]


def _count(count: int | None, default: int) -> int:
    return default if count is None else count


def confirm(job: Job, victim: Victim, config: StudyConfig, *, device: str = "cpu") -> ConfirmRecord:
    """Purify one victim with one seed, scored on `test`: a record as JSON types.

    Raises:
        NonFiniteError: the purification overflowed.
    """
    started = time.perf_counter()
    splits = victim.spec.load_data()
    clean = splits.train.clean_subset(config.clean_images_per_class, seed=job.seed)
    model = copy.deepcopy(victim.model).to(device)
    generator = torch.Generator().manual_seed(job.seed)
    images, labels = moved((clean.floats(), clean.labels), device)
    result = defend(model, images, job.settings, labels=labels, generator=generator)
    task, sets = config.task, victim.eval_sets(splits, "test").to(device)
    scores = task.evaluate(result.model(), sets)
    return {
        **job.about,
        "test": cast(VictimScores, asdict(scores)),
        "accuracy_drop": task.quality_of(victim.scores["test"]) - task.quality_of(scores),
        "seconds": time.perf_counter() - started,
    }


def confirmation(
    records: Sequence[ConfirmRecord], victims: Mapping[str, Victim]
) -> dict[str, Confirmation] | None:
    """What the records of a confirmation come to; None where there are none.

    Returns:
        configuration -> {"victims": {name: ...}, "roles": {role: ...}}. For a victim and for a role,
        every score of its task and `accuracy_drop` have mean, std, min, max and n over its runs, and
        `n_failed` counts those without scores; a victim has its role, its digest and its scores on
        `test` before.
    """
    found: dict[str, Confirmation] = {}
    for configuration in dict.fromkeys(record["configuration"] for record in records):
        mine = [record for record in records if record["configuration"] == configuration]
        names = [name for name in victims if any(r["victim"] == name for r in mine)]
        by_victim = {name: [r for r in mine if r["victim"] == name] for name in names}
        by_role = {
            role: [r for r in mine if r["role"] == role]
            for role in dict.fromkeys(rows[0]["role"] for rows in by_victim.values())
        }
        found[configuration] = {
            "victims": {
                name: {
                    "role": rows[0]["role"],
                    "digest": victims[name].spec.digest,
                    "before": cast(VictimScores, asdict(victims[name].scores["test"])),
                    **_spreads(rows),
                }
                for name, rows in by_victim.items()
            },
            "roles": {role: _spreads(rows) for role, rows in by_role.items()},
        }
    return found or None


def confirmation_metrics(found: Mapping[str, Confirmation]) -> dict[str, float]:
    """What MLflow's parent run is told: CONFIGURATION/ROLE/SCORE, its standard deviation as ..._std."""
    metrics: dict[str, float] = {}
    for configuration, result in found.items():
        for role, scores in result["roles"].items():
            for name in CONFIRMED:
                if (value := cast(Spread | None, scores.get(name))) is not None:
                    place = f"confirm/{configuration}/{role}/{name}"
                    metrics |= {place: value["mean"], f"{place}_std": value["std"]}
    return metrics


def _spreads(rows: Sequence[ConfirmRecord]) -> Spreads:
    done = [row for row in rows if "test" in row]
    found: Spreads = {"n_failed": len(rows) - len(done)}
    if done:
        scores = [known_scores(row["test"]) for row in done]
        found |= cast(Spreads, {name: spread([one[name] for one in scores]) for name in scores[0]})
        found["accuracy_drop"] = spread([row["accuracy_drop"] for row in done])
    return found
