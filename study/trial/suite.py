"""The victims of a study by their roles, and the confirmation of a choice on all of them.

Trials see the tuning victims alone, on `val`. After the choice every victim of the suite is purified
anew with the chosen configuration, several times, each time with a seed and clean images that no
trial had, and scored on `test`: what the choice is worth against attacks that it never saw, and what
it costs a model without a backdoor.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from bimask.defences.purify import defend
from bimask.defences.settings import DefenceConfig
from bimask.metrics import evaluate
from bimask.victims import Victim
from study.spec.config import StudyConfig
from study.spec.objectives import SCORES, spread
from study.spec.suspect import Subject
from study.trial.cases import Case

Role = Literal["tuning", "held_out", "control"]


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

    configuration: str
    settings: DefenceConfig
    victim: str
    role: Role
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.configuration, self.victim, self.seed


def jobs_of(config: StudyConfig, settings: Mapping[str, DefenceConfig]) -> list[Job]:
    """Everything that the confirmation runs.

    Args:
        settings: "chosen" and "paper_defaults", or one of them -> what to purify with.
    """
    asked = config.confirmation
    if asked is None:
        return []
    counts = {"chosen": asked.seeds, "paper_defaults": asked.paper_seeds}
    first = config.seed + config.repeats  # the seeds before it are those of the trials
    return [
        Job(configuration, one, victim, role, seed)
        for configuration, one in settings.items()
        for victim, role in roles(config).items()
        for seed in range(first, first + _count(counts[configuration], asked.seeds))
    ]


def _count(count: int | None, default: int) -> int:
    return default if count is None else count


def confirm(job: Job, victim: Victim, config: StudyConfig, *, device: str = "cpu") -> dict[str, Any]:
    """Purify one victim with one seed, scored on `test`: a record as JSON types.

    Raises:
        NonFiniteError: the purification overflowed.
    """
    started = time.perf_counter()
    splits = victim.spec.load_data()
    clean = splits.train.clean_subset(config.clean_images_per_class, seed=job.seed)
    model = copy.deepcopy(victim.model).to(device)
    generator = torch.Generator().manual_seed(job.seed)
    images, labels = clean.floats().to(device), clean.labels.to(device)
    result = defend(model, images, job.settings, labels=labels, generator=generator)
    scores = evaluate(result.model(), victim.eval_sets(splits, "test").to(device))
    return {
        "configuration": job.configuration,
        "victim": job.victim,
        "role": job.role,
        "seed": job.seed,
        "test": asdict(scores),
        "accuracy_drop": victim.scores["test"].clean_accuracy - scores.clean_accuracy,
        "seconds": time.perf_counter() - started,
    }


def confirmation(
    records: Sequence[Mapping[str, Any]], victims: Mapping[str, Victim]
) -> dict[str, Any] | None:
    """What the records of a confirmation come to; None where there are none.

    Returns:
        configuration -> {"victims": {name: ...}, "roles": {role: ...}}. For a victim and for a role,
        `clean_accuracy`, `attack_success`, `recovery` and `accuracy_drop` each have mean, std, min, max
        and n over its runs, and `n_failed` counts those without scores; a victim has its role, its
        digest and its scores on `test` before.
    """
    found: dict[str, Any] = {}
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
                    "before": asdict(victims[name].scores["test"]),
                }
                | _spreads(rows)
                for name, rows in by_victim.items()
            },
            "roles": {role: _spreads(rows) for role, rows in by_role.items()},
        }
    return found or None


def confirmation_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow's parent run is told: CONFIGURATION/ROLE/SCORE, its standard deviation as ..._std."""
    metrics: dict[str, float] = {}
    for configuration, result in found.items():
        for role, scores in result["roles"].items():
            for name, value in scores.items():
                if name != "n_failed":
                    place = f"confirm/{configuration}/{role}/{name}"
                    metrics |= {place: value["mean"], f"{place}_std": value["std"]}
    return metrics


def _spreads(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    rows = list(records)
    done = [row for row in rows if "test" in row]
    values = {name: [row["test"][name] for row in done] for name in SCORES}
    values["accuracy_drop"] = [row["accuracy_drop"] for row in done]
    return {name: spread(column) for name, column in values.items() if column} | {
        "n_failed": len(rows) - len(done)
    }
