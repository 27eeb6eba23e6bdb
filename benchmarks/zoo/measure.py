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
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import RESULTS, table
from benchmarks.zoo import Stranger, strangers
from benchmarks.zoo.rows import Part
from benchmarks.zoo.triggers import build
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.purify import purify
from bimask.inspection.trigger_pool import TriggerPool
from bimask.nets.admission import admit
from study.store.provenance import commit

ABOUT = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip()
HERE = Path(__file__).parents[1]
KEPT = RESULTS / "zoo" / "strangers.jsonl"
PARTS: tuple[Part, ...] = ("held", "tune")
REACHED = 0.05  # attack success of the oracle up to which masks could remove the backdoor
Record = dict[str, Any]


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


def kept() -> list[Record]:
    """What was measured so far."""
    return [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.is_file() else []


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


def of(records: list[Record], row: str, method: str, per_class: int = 10) -> list[Record]:
    """The records of a row by one method."""
    wanted = (row, method, per_class)
    return [r for r in records if (r["row"], r["method"], r["per_class"]) == wanted and "acc" in r]


def mean(records: list[Record], key: str) -> float | None:
    """Mean of a score; None where there is none."""
    values = [r[key] for r in records if key in r]
    return statistics.fmean(values) if values else None


def shown(records: list[Record], key: str) -> str:
    """Mean of a score in per cent, with the least and the most."""
    values = [100 * r[key] for r in records if key in r]
    if not values:
        return "-"
    spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def summary(records: list[Record], part: Part) -> str:
    """One sentence of conclusion on a part."""
    rows = list(dict.fromkeys(r["row"] for r in records if r["part"] == part))
    robust = {row: of(records, row, "robust") for row in rows}
    asr = {row: value for row in rows if (value := mean(robust[row], "asr")) is not None}
    lost = [r["acc_before"] - r["acc"] for row in asr for r in robust[row]]
    clean = [r["acc_before"] - r["acc"] for row in rows if row not in asr for r in robust[row]]
    within = {
        row: value
        for row, value in asr.items()
        if (best := mean(of(records, row, "oracle"), "asr")) is not None and best <= REACHED
    }
    if not asr or not within:
        return "Nothing was measured yet."
    worst = max(within, key=within.__getitem__)
    twins = f"clean models lose {100 * statistics.fmean(clean):.1f}" if clean else "no clean model"
    return (
        f"Over {len(asr)} backdoored rows the mean attack success is "
        f"{100 * statistics.fmean(asr.values()):.1f} % "
        f"({100 * statistics.fmean(within.values()):.1f} % over the {len(within)} whose oracle reaches "
        f"{100 * REACHED:.0f} %, at worst {100 * within[worst]:.1f} %, {worst}); they lose "
        f"{100 * statistics.fmean(lost):.1f} points of accuracy on average, {twins}."
    )


def report(records: list[Record]) -> str:
    """The page."""
    heads = ["row", "ACC", "ASR", "fast ACC", "fast ASR", "robust ACC", "robust ASR", "oracle ASR"]
    heads += ["robust ASR, 3 a class", "1 a class", "ACC, 3 a class", "1 a class", "s"]
    parts = []
    for part in PARTS:
        if not any(r["part"] == part for r in records):
            continue
        rows = []
        for row in dict.fromkeys(r["row"] for r in records if r["part"] == part):
            robust, fast = of(records, row, "robust"), of(records, row, "fast")
            few = [of(records, row, "robust", count) for count in (3, 1)]
            rows.append(
                [row, shown(robust[:1], "acc_before"), shown(robust[:1], "asr_before")]
                + [shown(fast, "acc"), shown(fast, "asr"), shown(robust, "acc"), shown(robust, "asr")]
                + [shown(of(records, row, "oracle"), "asr")]
                + [shown(one, "asr") for one in few]
                + [shown(one, "acc") for one in few]
                + [f"{mean(robust, 'seconds') or 0:.0f}"]
            )
        title = (
            "Rows that no setting was tuned on"
            if part == "held"
            else "Rows that settings were tuned on"
        )
        parts.append(f"## {title}\n\n{summary(records, part)}\n\n" + "\n".join(table(heads, rows)))
    failures = [f"- {r['row']}, {r['method']}: {r['failure']}" for r in records if "failure" in r]
    if failures:
        parts.append("## Failures\n\n" + "\n".join(failures))
    commits = ", ".join(dict.fromkeys(r.get("commit", "unknown") for r in records))
    made = f"{len(records)} records, one thread each, measured at the commit {commits}."
    return "\n\n".join([f"# Strangers\n\n{ABOUT}", made, *parts]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure([given.part] if given.part else PARTS, given.seeds)
    (HERE / "zoo.md").write_text(report(kept()))


if __name__ == "__main__":
    main()
