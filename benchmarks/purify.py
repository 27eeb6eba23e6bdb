"""How fast a purification is, and at what quality: one command, one file of results.

    python -m benchmarks.purify                          # digits: rounds, exactness, memory, ...
    python -m benchmarks.purify --cifar FOLDER           # and CIFAR-10 pictures, FOLDER/train, /test
    python -m benchmarks.purify --parts quality          # time to quality, naive against fast
    python -m benchmarks.purify --device cuda            # see benchmarks/gpu.md

Each part goes into benchmarks/results/DEVICE.json, from which benchmarks/speed.md is written. Ratios
are of one run; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, report
from benchmarks.cases import BenchCase, cifar, digits, fast, generator, published
from benchmarks.naive import Naive
from benchmarks.records import RESULTS, keep
from benchmarks.settings import LEVERS, TUNED
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.population import PopulationPurifier
from bimask.defences.ims.purify import purify
from bimask.defences.ims.result import RoundLog
from bimask.devices import resolve_device
from bimask.inspection.trigger_pool import TriggerPool
from bimask.masking.masks import MaskSet
from bimask.metrics import Scores

STAGES = ("initialise", "minimise", "select")
SEEDS = range(5)

# Runs of minutes meet other processes: on a CPU with one thread, its own time is what counts.
CLOCK = time.process_time


def rounds(case: BenchCase, count: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds a round of `count` rounds of each stage: naive, exact, fast."""
    model, images = case.victim.model.to(device), case.clean(0).to(device)
    found: dict[str, Any] = {}
    for stage in STAGES:
        paper = published({stage: count + 1})
        quick = fast(**{f"{s}_rounds": (count + 1) * (s == stage) for s in STAGES})

        def timed(program: Callable[..., Any], config: PurifyConfig) -> Callable[[], float]:
            def run() -> float:
                seconds, _ = program(model, images, config)
                return statistics.median(seconds)

            return run

        seen = measure.alternating(
            repeats,
            naive=timed(measure.naive_round_seconds, paper),
            exact=timed(measure.round_seconds, paper),
            fast=timed(measure.round_seconds, quick),
        )
        found[stage] = {name: measure.spread(values) for name, values in seen.items()}
        for name in ("exact", "fast"):
            ratios = [n / v for n, v in zip(seen["naive"], seen[name], strict=True)]
            found[stage][f"naive / {name}"] = measure.spread(ratios)
    return found


def exactness(case: BenchCase, count: int, device: torch.device) -> dict[str, Any]:
    """Largest differences of masks after `count` rounds of each stage, published settings.

    In single precision Adam turns rounding into steps. So beside naive against exact it matters how far
    each is from the plain program in double, and what is left where both round alike: losses in double,
    batch norms not folded, the same memory format.
    """
    config = published(dict.fromkeys(STAGES, count))

    def masks(program: Callable[..., Any], dtype: torch.dtype, **changes: Any) -> Any:
        model = copy.deepcopy(case.victim.model).to(device, dtype)
        fine = {name: changes.pop(name) for name in ("fine",) if name in changes}
        images = case.clean(0).to(device, dtype)
        return program(model, images, config.model_copy(update=changes), **fine)[1].double()

    naive, exact = measure.naive_round_seconds, measure.round_seconds
    single = torch.float32
    alike = {"fold_batch_norm": False, "memory_format": "contiguous"}
    truth, plain = masks(naive, torch.float64), masks(naive, single)
    fine, mine = masks(naive, single, fine=True), masks(exact, single)
    compared = {
        "exact and naive, float64": (masks(exact, torch.float64), truth),
        "exact in float32 and naive in float64": (mine, truth),
        "naive in float32 and naive in float64": (plain, truth),
        "exact and naive, float32": (mine, plain),
        "exact and naive, float32, losses of both in double": (mine, fine),
        "the same, batch norms not folded, one memory format": (masks(exact, single, **alike), fine),
    }
    return {name: (one - other).abs().max().item() for name, (one, other) in compared.items()}


def memory(case: BenchCase, device: torch.device) -> dict[str, Any]:
    """Peak bytes of tensors: one forward and backward of the victim, naive, exact, fast."""
    model, images = case.victim.model.to(device), case.clean(0).to(device)
    paper = published(dict.fromkeys(STAGES, 2), inner_steps=3)
    quick = fast(**{f"{s}_rounds": 2 for s in STAGES})

    def once() -> None:
        x = images.clone().requires_grad_()
        model.requires_grad_(False)
        torch.nn.functional.cross_entropy(model(x), model(images).argmax(1)).backward()

    peaks = {
        "one forward and backward": measure.peak_bytes(once),
        "naive": measure.peak_bytes(lambda: Naive(model, images, paper).run()),
        "exact": measure.peak_bytes(lambda: purify(model, images, paper)),
        "fast": measure.peak_bytes(lambda: purify(model, images, quick)),
    }
    one = peaks["one forward and backward"]
    return {name: {"bytes": value, "ratio": value / one} for name, value in peaks.items()}


def population(
    case: BenchCase, members: int, repeats: int, device: torch.device, count: int
) -> dict[str, Any]:
    """`members` configurations at once against one after another, and launches a member."""
    model, images = case.victim.model.to(device), case.clean(0).to(device)
    found: dict[str, Any] = {}
    for kind, base in (("exact", published({})), ("fast", fast())):
        limits = {f"{s}_rounds": count for s in STAGES}
        configs = [
            base.model_copy(
                update=limits
                | {"mask_lr": 0.02 + 0.005 * k, "sharpness": 10.0 + k, "inner_steps": 3, "budget": 0.3}
                | {"step_size": None}
            )
            for k in range(members)
        ]

        def alone() -> float:
            begun = time.perf_counter()
            for config in configs:  # noqa: B023
                purify(model, images, config, generator=generator(0))
            return time.perf_counter() - begun

        def together() -> float:
            begun = time.perf_counter()
            generators = [generator(0) for _ in configs]  # noqa: B023
            PopulationPurifier(model, images, configs, generators=generators).run()  # noqa: B023
            return time.perf_counter() - begun

        seen = measure.alternating(repeats, alone=alone, together=together)
        ratios = [a / t for a, t in zip(seen["alone"], seen["together"], strict=True)]
        found[kind] = {name: measure.spread(values) for name, values in seen.items()} | {
            "alone / together": measure.spread(ratios)
        }
        if torch.get_num_threads() == 1:  # the profiler does not see what other threads launch
            # in passes that hold all members, as an accelerator's do; a CPU's hold what its cache does
            wide = {"images_per_pass": members * len(images)}
            configs = [config.model_copy(update=wide) for config in configs]
            counted = {"alone": measure.launches(alone), "together": measure.launches(together)}
            found[kind] |= {
                "launches a member": {name: count / members for name, count in counted.items()},
                "launches alone / together": counted["alone"] / counted["together"],
            }
    return found


def growth(case: BenchCase, device: torch.device) -> dict[str, Any]:
    """Seconds a round of `fast` in the last stage as one thing grows."""
    model = case.victim.model.to(device)

    def seconds(images: torch.Tensor, count: int = 6) -> float:
        config = fast(initialise_rounds=0, minimise_rounds=0, select_rounds=count)
        return statistics.median(measure.round_seconds(model, images, config)[0])

    def together(k: int) -> float:
        marks: list[float] = []
        config = fast(initialise_rounds=0, minimise_rounds=0, select_rounds=6)
        purifier = PopulationPurifier(
            model,
            case.clean(0).to(device),
            [config] * k,
            on_round=lambda row, *_: marks.append(time.perf_counter()) if row == 0 else None,
        )
        purifier.run()
        return statistics.median(b - a for a, b in itertools.pairwise(marks)) / k

    return {
        "images": {str(10 * n): seconds(case.clean(0, n).to(device)) for n in (2, 5, 10, 20)},
        "rounds": {str(n): seconds(case.clean(0).to(device), n + 1) * n for n in (5, 10, 20, 40)},
        "members, a member": {str(k): together(k) for k in (1, 2, 4, 8, 16)},
    }


def widths(device: torch.device) -> dict[str, float]:
    """Seconds a round of `fast` as the channels of the net grow; the weights are random."""
    from bimask.nets import build_net

    images = torch.rand(100, 1, 16, 16, generator=generator(0)).to(device)
    found = {}
    for width in (8, 16, 32, 64):
        net = build_net(
            "small_resnet", in_channels=1, num_classes=10, width=width, mean=[0.5], std=[0.25]
        ).to(device)
        config = fast(initialise_rounds=0, minimise_rounds=0, select_rounds=6)
        found[str(43 * width)] = statistics.median(measure.round_seconds(net, images, config)[0])
    return found


def profile(case: BenchCase, device: torch.device) -> dict[str, Any]:
    """Where the time of two triggered rounds goes, and that of the search of triggers."""
    model, images = case.victim.model.to(device), case.clean(0).to(device)
    pool = TriggerPool.search(model, images)
    programs: dict[str, Callable[[], Any]] = {
        name: partial(purify, model, images, config, pool=pool if config.class_triggers else None)
        for name, config in {
            "exact": published({"select": 2}),
            "exact, bfloat16": published({"select": 2}, precision="bfloat16"),
            "fast": fast(initialise_rounds=0, minimise_rounds=0, select_rounds=2),
            "robust": PurifyConfig.profile(
                "robust", initialise_rounds=0, minimise_rounds=0, select_rounds=2
            ),
        }.items()
    }
    programs["search of triggers"] = partial(TriggerPool.search, model, images)
    return {name: measure.shares(program) for name, program in programs.items()}


def whole(case: BenchCase, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of `robust` from suspect to masks, and of the plain program with the published schedule.

    The plain program's are its seconds a round times the published rounds: it knows no early stopping.
    """
    model, images = case.victim.model.to(device), case.clean(0).to(device)
    paper = PurifyConfig.profile("paper")
    stages = {stage: getattr(paper, f"{stage}_rounds") for stage in STAGES}

    def plain() -> float:
        """Of all stages: a triggered round takes alike in both."""
        seconds = {
            stage: statistics.median(
                measure.naive_round_seconds(model, images, published({stage: 3}))[0]
            )
            for stage in ("initialise", "select")
        }
        seconds["minimise"] = seconds["select"]
        return sum(seconds[stage] * count for stage, count in stages.items())

    found: dict[str, list[float]] = {"search": [], "purification": []}

    def robust() -> float:
        begun = time.perf_counter()
        pool = TriggerPool.search(model, images)
        searched = time.perf_counter()
        purify(model, images, PurifyConfig.profile("robust"), pool=pool, generator=generator(0))
        ended = time.perf_counter()
        found["search"].append(searched - begun)
        found["purification"].append(ended - searched)
        return ended - begun

    def a_round(**changes: Any) -> float:
        config = published({"select": 3}, **changes)
        return statistics.median(measure.round_seconds(model, images, config)[0])

    seen = measure.alternating(
        repeats,
        naive=plain,
        robust=robust,
        exact=a_round,
        bfloat16=lambda: a_round(precision="bfloat16"),
        naive_round=lambda: statistics.median(
            measure.naive_round_seconds(model, images, published({"select": 3}))[0]
        ),
    )
    ratios = {
        "naive / robust, whole": ("naive", "robust"),
        "naive / exact, a round": ("naive_round", "exact"),
        "naive / exact in bfloat16, a round": ("naive_round", "bfloat16"),
    }
    return {
        "seconds": {name: measure.spread(values) for name, values in {**seen, **found}.items()},
        "ratios": {
            name: measure.spread([a / b for a, b in zip(seen[one], seen[other], strict=True)])
            for name, (one, other) in ratios.items()
        },
    }


class _Watch:
    """Seconds of a run without those of its evaluation, and when it first held the goal for good."""

    def __init__(self, case: BenchCase, every: int) -> None:
        self.case, self.every = case, every
        self.spent, self.begun = 0.0, CLOCK()
        self.seen: list[tuple[int, float, Scores]] = []

    def __call__(self, step: int, masks: MaskSet, last: bool) -> None:
        self.spent += CLOCK() - self.begun
        if step % self.every == 0 or last:
            self.seen.append((step, self.spent, self.case.scores(masks)))
        self.begun = CLOCK()

    def result(self) -> dict[str, Any]:
        before = self.case.victim.scores["test"]
        first = None
        for step, seconds, scores in reversed(self.seen):
            if not self.case.goal.met(scores, before):
                break
            first = (step, seconds)
        scores = self.seen[-1][2]
        return {
            "seconds": None if first is None else first[1],
            "round": None if first is None else first[0],
            "total_seconds": self.spent,
            "clean_accuracy": scores.clean_accuracy,
            "attack_success": scores.attack_success,
            "recovery": scores.recovery,
            "n_clean": scores.n_clean,
            "n_triggered": scores.n_triggered,
        }


def quality_run(
    case: BenchCase, config: PurifyConfig, seed: int, device: torch.device, *, naive: bool, every: int
) -> dict[str, Any]:
    """One run watched on `test`; evaluation is not part of its time."""
    total = config.initialise_rounds + config.minimise_rounds + config.select_rounds
    model, images = case.victim.model.to(device), case.clean(seed).to(device)
    watch = _Watch(case, every)
    if naive:
        steps = iter(range(total))

        def plain(_stage: str, _round: int, masks: MaskSet) -> None:
            step = next(steps)
            watch(step, masks, step == total - 1)

        Naive(model, images, config).run(plain)
    else:

        def on_round(log: RoundLog, masks: MaskSet) -> None:
            watch(log.step, masks, log.step == total - 1)

        purify(model, images, config, generator=generator(seed), on_round=on_round)
    return watch.result() | {"seed": seed}


def quality(
    case: BenchCase, attack: str, device: torch.device, programs: tuple[str, ...]
) -> dict[str, Any]:
    """Seconds until the goal is held for good, each program at its own best settings, five seeds."""
    found: dict[str, Any] = {}
    for program in programs:
        if (config := TUNED[attack].get(program)) is None:
            continue
        runs = []
        for seed in SEEDS:
            # scoring CIFAR-10's 19,000 images takes longer than a round: at the end only
            every = sys.maxsize if attack == "cifar" else 1
            naive = program == "naive"
            runs.append(quality_run(case, config, seed, device, naive=naive, every=every))
            print(f"{case.name} {program} seed {seed}: {runs[-1]}", flush=True)
        found[program] = summary(runs) | {"settings": config.model_dump(exclude_defaults=True)}
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs of several seeds with their means; the time to quality is null where one never held it."""
    times = [run["seconds"] for run in runs]
    held = [t for t in times if t is not None]
    return {
        "runs": runs,
        "held": len(held),
        "seconds": statistics.mean(held) if len(held) == len(times) else None,
        "seconds_where_held": statistics.mean(held) if held else None,
        "total_seconds": statistics.mean(run["total_seconds"] for run in runs),
    } | {
        name: {
            "mean": statistics.mean(run[name] for run in runs),
            "std": statistics.stdev(run[name] for run in runs) if len(runs) > 1 else math.nan,
        }
        for name in ("clean_accuracy", "attack_success", "recovery")
    }


def levers(case: BenchCase, attack: str, device: torch.device) -> dict[str, Any]:
    """The settings of `fast` with one lever at a time the other way; three seeds."""
    base = TUNED[attack]["fast"]
    found: dict[str, Any] = {}
    untouched: dict[str, dict[str, Any]] = {"as tuned": {}}
    for name, changes in (untouched | LEVERS).items():
        config = PurifyConfig.model_validate(base.model_dump() | changes)
        if config == base and changes:
            continue
        runs = [quality_run(case, config, seed, device, naive=False, every=2) for seed in range(3)]
        found[name] = summary(runs) | {"changes": changes}
        print(f"{case.name} lever {name}: {found[name]['seconds_where_held']}", flush=True)
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")


ONCE = ("rounds", "exactness", "memory", "population", "growth", "profile", "whole")  # a net
PARTS = (*ONCE, "quality", "levers")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.purify", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 pictures: FOLDER/train, FOLDER/test")
    parser.add_argument("--only-cifar", action="store_true", help="skip digits")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds of each stage")
    parser.add_argument("--attacks", nargs="+", default=["badnets", "blended"])
    parser.add_argument("--programs", nargs="+", default=["naive", "fast"])
    options = parser.parse_args(arguments)

    global CLOCK
    if options.threads > 1 or options.device != "cpu":
        CLOCK = time.perf_counter
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    cases = {} if options.only_cifar else {a: digits(a) for a in options.attacks}
    if options.cifar:
        cases["cifar"] = cifar(options.cifar)
    path = RESULTS / f"{device.type}.json"
    more = f", {options.threads} threads" if options.threads > 1 else ""  # a table of its own
    for attack, case in cases.items():
        for part in options.parts:
            if part in ONCE and attack == "blended":
                continue  # the net is the same
            if attack == "cifar" and part in ("growth", "levers", "exactness"):
                continue
            print(f"{case.name}: {part}", flush=True)
            begun = time.perf_counter()
            value: dict[str, Any]
            if part == "rounds":
                value = rounds(case, options.rounds, options.repeats, device)
            elif part == "exactness":
                value = exactness(case, options.rounds, device)
            elif part == "memory":
                value = memory(case, device)
            elif part == "population":
                value = population(case, 8, options.repeats, device, 2 if attack == "cifar" else 6)
            elif part == "growth":
                value = growth(case, device) | {"channels": widths(device)}
            elif part == "profile":
                value = profile(case, device)
            elif part == "whole":
                value = whole(case, options.repeats, device)
            elif part == "quality":
                programs = tuple(options.programs) if attack != "cifar" else ("fast",)
                value = quality(case, attack, device, programs)
            else:
                value = levers(case, attack, device)
            about = hardware(device) | {"seconds": time.perf_counter() - begun}
            keep(path, case.name, part + more, value | {"about": about})
            print(json.dumps(value, indent=1), flush=True)
    report.write()


if __name__ == "__main__":
    main(sys.argv[1:])
