"""What one GPU does with a purification: one command of some minutes, one page.

    bash benchmarks/gpu_check.sh FOLDER          # FOLDER/train/CLASS/*, FOLDER/test/CLASS/*: CIFAR-10

A victim of the published width is trained, then a few rounds of `paper`, `fast` and `robust` and of
populations are timed. Each part has its record as soon as it is done, and a part that no time is left
for is not begun. With `--device cpu --width 4` the same program runs on a CPU; what it says there is no
record.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import report
from benchmarks.pages.gpu_check import KEPT, MEMBERS
from benchmarks.purify import hardware
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.population import PopulationPurifier
from bimask.devices import resolve_device
from bimask.inspection.trigger_pool import TriggerPool
from bimask.victims import Victim, VictimSpec, obtain_victim
from study.pipeline.dry_run import Operations
from study.store.provenance import commit

FOLDER = Path("outputs/benchmarks")
ROUNDS = 6  # of the last stage, of which the first warms up
WARM = 1
PROFILES = ("paper", "fast", "robust")
SIDE = 4096  # of the square matrices whose product shows the arithmetic limit


def settings(profile: str, **changes: Any) -> PurifyConfig:
    """A profile with `ROUNDS` rounds of the last stage alone."""
    limits = {"initialise_rounds": 0, "minimise_rounds": 0, "select_rounds": ROUNDS, "patience": None}
    return PurifyConfig.profile(profile, **limits | changes)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def limit(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations a second of a large product of matrices: the best of ten."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        begun = now(device)
        a @ b
        seconds.append(now(device) - begun)
    return 2 * side**3 / min(seconds)


def rounds(
    model: nn.Module, images: Tensor, configs: list[PurifyConfig], pool: Any
) -> tuple[list[float], PopulationPurifier]:
    """Seconds of every round but the first, of all members together; the losses of a round are read
    back, so that a round has ended when it says so."""
    marks: list[float] = []

    def mark(member: int, _log: Any, _masks: Any) -> None:
        if member == len(configs) - 1:
            marks.append(time.perf_counter())

    purifier = PopulationPurifier(model, images, configs, on_round=mark, pool=pool)
    purifier.run()
    return [b - a for a, b in itertools.pairwise(marks)][WARM - 1 :], purifier


def device_share(program: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Kernels, and the share of the time in which the device computes."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=list({ProfilerActivity.CPU, activity})) as seen:
        begun = now(device)
        program()
        wall = now(device) - begun
    kernels = [event for event in seen.events() if event.device_type.name == "CUDA"]
    if device.type != "cuda":  # operators that compute, in the place of kernels
        kernels = [e for e in seen.events() if e.name.startswith("aten::") and not e.cpu_children]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    return {"kernels": len(kernels), "busy": min(1.0, busy / wall)}


def of_profile(victim: Victim, images: Tensor, name: str, pool: Any, peak: float) -> dict[str, Any]:
    """Seconds, kernels and operations of a round of one profile."""
    device = images.device
    config = settings(name)
    own = pool if config.class_triggers else None
    seconds, _ = rounds(victim.model, images, [config], own)
    with Operations() as counted:
        rounds(victim.model, images, [config], own)
    share = device_share(lambda: rounds(victim.model, images, [config], own), device)
    operations, median = counted.count / ROUNDS, statistics.median(seconds)
    return {
        "seconds a round": median,
        "kernels a round": share["kernels"] / ROUNDS,
        "device busy": share["busy"],
        "operations a round": operations,
        "of the arithmetic limit": operations / median / peak,
    }


def of_population(victim: Victim, images: Tensor, members: int) -> dict[str, Any]:
    """Seconds and kernels of a round, for each member of a population of `fast`."""
    configs = [settings("fast", mask_lr=0.05 + 0.001 * k) for k in range(members)]
    seconds, _ = rounds(victim.model, images, configs, None)
    share = device_share(lambda: rounds(victim.model, images, configs, None), images.device)
    found = {
        "seconds a round and member": statistics.median(seconds) / members,
        "kernels a round and member": share["kernels"] / ROUNDS / members,
        "device busy": share["busy"],
    }
    if images.device.type == "cuda":
        found["peak GiB"] = torch.cuda.max_memory_allocated(images.device) / 2**30
    return found


def masks_apart(victim: Victim, images: Tensor) -> dict[str, float]:
    """The largest difference of masks after a few rounds here and on the CPU, in double."""

    def masks(device: str) -> Tensor:
        model = victim.model.double().to(device)
        config = settings("paper", inner_steps=3, select_rounds=3)
        (result,) = PopulationPurifier(model, images.double().to(device), [config]).run()
        if isinstance(result, Exception):
            raise result
        return torch.stack([result.masks.mask, result.masks.selection]).detach().cpu()

    here, there = masks(str(images.device)), masks("cpu")
    victim.model.float().to(images.device)
    return {"largest difference of masks": (here - there).abs().max().item()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cifar", type=Path, help="folder of pictures; without it digits are taken")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=480, help="after which no part is begun")
    parser.add_argument("--side", type=int, default=SIDE)
    options = parser.parse_args()
    device, begun = resolve_device(options.device), time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    kept: dict[str, Any] = {
        "about": {**hardware(device), "commit": commit(), "width": options.width, "tf32": True},
        "parts": {},
    }

    def part(name: str, measured: Callable[[], dict[str, Any]]) -> None:
        if time.perf_counter() - begun > options.seconds:
            found: dict[str, Any] = {"not run": "no time was left"}
        else:
            try:
                found = measured()
            except (RuntimeError, torch.OutOfMemoryError) as error:
                found = {"not run": str(error).splitlines()[0]}
        kept["parts"][name] = found
        if device.type == "cuda":
            KEPT.parent.mkdir(parents=True, exist_ok=True)
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"{time.perf_counter() - begun:4.0f} s  {name}: {found}", flush=True)

    dataset = "digits" if options.cifar is None else f"imagefolder:{options.cifar}"
    spec = VictimSpec(
        dataset=dataset,
        net="preactresnet18",
        width=options.width,
        epochs=options.epochs,
        shift=2,
        precision="bfloat16" if device.type == "cuda" else "float32",
        min_clean_accuracy=0,
        min_attack_success=0,
    )
    started = time.perf_counter()
    victim = obtain_victim(spec, FOLDER / "victims", device=device)
    images = spec.load_data().train.clean_subset(10, seed=0).floats().to(device)
    victim.model.to(device)
    scores = victim.scores["test"]
    trained = {"seconds": time.perf_counter() - started}
    trained |= {"clean accuracy": scores.clean_accuracy, "attack success": scores.attack_success}
    part("victim", lambda: trained)
    peaks: dict[str, float] = {}
    for name, dtype in (("float32 (TF32)", torch.float32), ("bfloat16", torch.bfloat16)):
        peaks[name] = limit(device, dtype, options.side)
    part("limit", lambda: {f"TFLOP/s, {name}": value / 1e12 for name, value in peaks.items()})
    pools: list[Any] = []

    def search() -> dict[str, float]:
        started = now(device)
        pools.append(TriggerPool.search(victim.model, images))
        return {"seconds": now(device) - started}

    for name in PROFILES:
        if name == "robust":
            part("trigger search", search)
        peak = peaks["float32 (TF32)" if name == "paper" else "bfloat16"]
        pool = pools[0] if pools else None
        part(name, partial(of_profile, victim, images, name, pool, peak))
    for members in MEMBERS:
        part(f"population of {members}", partial(of_population, victim, images, members))
    part("masks", lambda: masks_apart(victim, images))
    report.write()


if __name__ == "__main__":
    main()
