"""What the profile `robust` leaves of the strangers' backdoors; writes benchmarks/zoo.md.

    python -m benchmarks.zoo.measure [--part tune|held] [--seeds 3]     # one thread

Every row is purified with 10 clean images a class by `fast`, by `robust`, and by the oracle, which is
`robust` with the row's own trigger in place of the searched ones: what masks could do if the trigger
were known, which no defender knows. `robust` is also run with 3 and 1 images a class. The rows of the
part `held` decided no setting. Results are kept as they come in; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.pages.zoo import KEPT, Record, kept
from benchmarks.zoo import Stranger, strangers
from benchmarks.zoo.rows import Part
from benchmarks.zoo.triggers import build
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.purify import purify
from bimask.inspection.trigger_pool import TriggerPool
from bimask.nets.admission import admit
from study.store.provenance import commit

PARTS: tuple[Part, ...] = ("held", "tune")


class TruePool(TriggerPool):
    """Draws the row's own trigger, whatever the class: what no defender has."""

    def __init__(self, stranger: Stranger) -> None:
        settings = dict(stranger.row.trigger or {})
        object.__setattr__(self, "triggers", ())
        object.__setattr__(self, "weights", torch.ones(1))
        object.__setattr__(self, "rows", None)
        object.__setattr__(self, "_trigger", build(settings.pop("kind"), settings))

    _trigger: Any

    def on(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """The triggered images: (N, C, H, W) -> same."""
        put: Tensor = self._trigger.put(images)
        return put


@dataclass(frozen=True)
class Job:
    """One purification of a row."""

    method: str
    per_class: int
    seed: int


def jobs(stranger: Stranger, seeds: int) -> Iterable[Job]:
    """What is measured of a row."""
    for seed in range(seeds):
        yield Job("robust", 10, seed)
    yield Job("fast", 10, 0)
    if stranger.attack is not None:
        yield Job("oracle", 10, 0)
    yield Job("robust", 3, 0)
    yield Job("robust", 1, 0)


def run(stranger: Stranger, job: Job) -> Record:
    """Purify a row, and score it on its test images."""
    images = stranger.clean_pool.clean_subset(job.per_class, seed=job.seed).floats()
    settings = PurifyConfig.profile("fast" if job.method == "fast" else "robust")
    pool: TriggerPool | None = None
    started = time.process_time()
    if job.method == "oracle":
        pool = TruePool(stranger)
    elif settings.class_triggers:
        pool = TriggerPool.search(admit(stranger.model, images).model, images)
    generator = torch.Generator().manual_seed(job.seed)
    record: Record = {"row": stranger.name, "part": stranger.part, **vars(job), "commit": commit()}
    before = stranger.scores()
    try:
        result = purify(stranger.model, images, settings, generator=generator, pool=pool)
    except Exception as error:  # a failure is a row of the table
        return record | {"failure": f"{type(error).__name__}: {error}"[:200]}
    after = stranger.scores(result.model())
    record |= {"seconds": time.process_time() - started}
    record |= {"acc_before": before.clean_accuracy, "acc": after.clean_accuracy}
    if stranger.attack is not None:
        record |= {"asr_before": vars(before)["attack_success"], "asr": vars(after)["attack_success"]}
    return record


def measure(parts: Iterable[Part], seeds: int) -> None:
    """Measure what is missing."""
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["row"], r["method"], r["per_class"], r["seed"]) for r in kept()}
    for part in parts:
        for stranger in strangers(part):
            for job in jobs(stranger, seeds):
                if (stranger.name, job.method, job.per_class, job.seed) not in done:
                    record = run(stranger, job)
                    with KEPT.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                    print(json.dumps(record), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure([given.part] if given.part else PARTS, given.seeds)
    report.write()


if __name__ == "__main__":
    main()
