"""Seconds of an epoch of CIFAR-10's victims, and what share of them is spent on data.

    python -m benchmarks.epoch --cifar FOLDER                # pictures: FOLDER/train, FOLDER/test
    python -m benchmarks.epoch --cifar FOLDER --batches 5    # a look, on few batches

PreActResNet18 of width 16 in bfloat16 with shifts of two pixels, as `benchmarks.victims` trains it.
Data handling is what makes a batch: images to floats, shift, and the trigger where it is put on inside
the loop. On a CPU its time is taken in place, within the epochs that are timed; elsewhere work is
queued, so that only whole epochs are. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch

from benchmarks import report
from benchmarks.measure import spread
from benchmarks.pages.training import KEPT
from benchmarks.purify import hardware
from benchmarks.victims import CIFAR, CIFAR_ATTACKS, spec_of
from bimask.data import ImageData, augment
from bimask.devices import resolve_device
from bimask.victims.training import fit

BAR = {"seconds": 45.0, "share of data": 0.1}  # on two idle cores
T = TypeVar("T")


class Clock:
    """Seconds spent in some functions, of an epoch."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., T]) -> Callable[..., T]:
        """The function, with its time on the clock."""

        def call(*args: Any, **keywords: Any) -> T:
            begun = time.perf_counter()
            try:
                return function(*args, **keywords)
            finally:
                self.seconds += time.perf_counter() - begun

        return call

    def read(self) -> float:
        """The seconds since it was last read."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def measured(cifar: Path, attack: str, epochs: int, batches: int | None, device: str) -> dict[str, Any]:
    """Times of all epochs but the first, which warms up."""
    common = CIFAR | {"dataset": f"imagefolder:{cifar}", "epochs": epochs + 1}
    spec = spec_of(attack, CIFAR_ATTACKS.get(attack, {}), common, seed=0)
    where = resolve_device(device)
    train = spec.load_data().train.to(where)
    if batches is not None:
        train = train.subset(torch.arange(batches * spec.batch_size))
    poisoning, recipe = spec.build_attack(), spec.recipe()
    poisoning.prepare(train, seed=0, fit_net=lambda clean: fit(clean, **recipe | {"epochs": 1}))
    if poisoning.batchwise:
        recipe |= {"attack": poisoning, "share": poisoning.share(train, **spec.rates())}
    else:
        train = poisoning.poison(train, seed=0, **spec.rates()).data

    clock, marks, data = Clock(), [], []

    def mark(*_: object) -> None:
        marks.append(time.perf_counter())
        data.append(clock.read())

    with (
        mock.patch.object(ImageData, "floats", clock.timed(ImageData.floats)),
        mock.patch("bimask.victims.training.augment", clock.timed(augment)),
        mock.patch.object(type(poisoning), "poison_batch", clock.timed(type(poisoning).poison_batch)),
    ):
        fit(train, on_epoch=mark, **recipe)
    seconds = [b - a for a, b in itertools.pairwise(marks)]
    found: dict[str, Any] = {"images": len(train), "attack": attack, "seconds": spread(seconds)}
    if where.type == "cpu":
        shares = [part / whole for part, whole in zip(data[1:], seconds, strict=True)]
        found["share of data"] = spread(shares)
    return found | {"epochs": epochs, "bar": BAR, "cores": len(os.sched_getaffinity(0))}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.epoch", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cifar", type=Path, required=True, help="CIFAR-10 pictures")
    parser.add_argument("--attacks", nargs="+", default=["badnets", "wanet"])
    parser.add_argument("--epochs", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--batches", type=int, help="fewer than there are; nothing is kept then")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    load = os.getloadavg()[0]
    rows = [
        measured(options.cifar, attack, options.epochs, options.batches, options.device)
        for attack in options.attacks
    ]
    for row in rows:
        share = row.get("share of data", {}).get("median", float("nan"))
        print(
            f"{row['attack']}: {row['seconds']['median']:.1f} s an epoch of {row['images']} images, "
            f"{100 * share:.1f} % of it data"
        )
    if options.batches is None:
        about = hardware(device) | {"load before": load}
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        KEPT.write_text(json.dumps({"about": about, "epochs": rows}, indent=1) + "\n")
        report.write()
        print(f"kept in {KEPT}")


if __name__ == "__main__":
    main(sys.argv[1:])
