"""`--dry-run` of a protocol: what it would cost. Nothing is trained, and nothing is written."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bimask.data import shape_of
from bimask.defences.settings import DefenceConfig
from bimask.devices import resolve_device
from bimask.nets import build_net
from bimask.victims import VictimSpec
from study.pipeline.dry_run import operations_of
from study.report.console import wide_console
from study.spec.comparison import ComparisonConfig
from study.spec.config import StudyError
from study.spec.protocol import EXAMPLE, load_protocol

BATCH, TRIED = 16, 3  # images of a timed pass, and how many are timed
BACKWARD = 2  # forward passes that a backward pass costs


@dataclass(frozen=True)
class Cost:
    """Hours of one device, of one comparison.

    Attributes:
        victims: to be trained; those that are there cost nothing.
        runs: of choices, on victims that no trial saw.
    """

    victims: int
    training: float
    searching: float
    runs: int
    judging: float

    @property
    def hours(self) -> float:
        return self.training + self.searching + self.judging


def tell_cost(
    path: Path | None,
    overrides: Mapping[str, object],
    outputs: Path,
    *,
    tflops: float | None = None,
    dollars: float | None = None,
) -> None:
    """Print the cases of a protocol, the hours of a device and what they cost.

    Args:
        tflops: sustained TFLOP/s of a device elsewhere; None times the nets here.
        dollars: of a device for an hour.

    Raises:
        BimaskError: for anything that would make the protocol fail.
    """
    if path is None:
        raise StudyError(f"--dry-run needs a protocol; give a YAML file such as {EXAMPLE}.")
    config, console = load_protocol(path, overrides), wide_console()
    comparisons = config.comparisons()
    gpus = any(one.gpus_per_trial for one in comparisons.values())
    device = resolve_device("auto" if gpus else "cpu")
    made: set[str] = set()
    costs = {}
    for key, one in comparisons.items():
        with console.status(f"timing {' '.join(key)}", spinner="dots"):
            costs[key] = _cost(one, outputs / "victims", device, tflops, made)
    console.tell(
        f"{len(config.cases())} cases, {len(config.suite())} victims, "
        f"{sum(cost.runs for cost in costs.values())} runs of choices",
        mark=config.name,
        style="bold",
    )
    console.print(_table(costs, dollars))
    console.tell(_how(device, tflops, gpus=gpus))


def _how(device: torch.device, tflops: float | None, *, gpus: bool) -> str:
    """What the hours are made of, and what is not in them."""
    source = (
        f"operations at {tflops:g} TFLOP/s"
        if tflops is not None
        else f"passes of every net timed here, on {device.type}, with random weights"
    )
    elsewhere = (
        " This machine has no GPU: with --tflops they are of one that you name."
        if gpus and device.type == "cpu" and tflops is None
        else ""
    )
    return (
        f"Hours of one device, from {source}.{elsewhere} Searches take their seconds. "
        "What an attack or IMS with `class_triggers` prepares, scoring and Ray's start are not in it."
    )


def _cost(
    config: ComparisonConfig, root: Path, device: torch.device, tflops: float | None, made: set[str]
) -> Cost:
    """The cost of a comparison, whose victims join those that are `made`."""
    tuning = config.specs(config.tuning, config.seeds.tuning)
    judged = [spec for part in config.judged().values() for spec in part]
    runs = {budget: sum(map(len, config.judged(budget).values())) for budget in config.budgets}
    seconds = _seconds_an_image(tuning[0], device, tflops)  # forward and back; all share the net
    shape = shape_of(tuning[0].dataset, tuning[0].image_size)
    new = [
        spec
        for spec in (*tuning, *judged)
        if spec.digest not in made and not spec.given and not spec.place(root).is_dir()
    ]
    made.update(spec.digest for spec in new)
    trained = sum(spec.epochs * shape.images * (1 if not spec.sam_rho else 2) for spec in new)
    entries = config.entries()
    share = config.gpus_per_trial or 1.0
    passes = sum(
        _forward_passes(settings, budget, shape.classes) * count
        for settings in (config.settings_of(entry, {}) for entry in entries)
        for budget, count in runs.items()
    )
    return Cost(
        victims=len(new),
        training=trained * seconds / 3600,
        searching=sum(entry.tuned for entry in entries) * config.search_seconds * share / 3600,
        runs=len(entries) * sum(runs.values()),
        judging=passes * seconds / (1 + BACKWARD) / 3600,
    )


def meta_net(spec: VictimSpec) -> nn.Module:
    """The net of a victim without memory behind it, in eval mode.

    Raises:
        SettingError: it cannot be made.
    """
    with torch.device("meta"):
        return _net(spec).eval()


def _net(spec: VictimSpec) -> nn.Module:
    shape = shape_of(spec.dataset, spec.image_size)
    return build_net(
        spec.net,
        in_channels=shape.channels,
        num_classes=shape.classes,
        width=spec.width,
        image_size=shape.size,
        mean=[0.5] * shape.channels,
        std=[0.25] * shape.channels,
    )


def forward_operations(spec: VictimSpec) -> int:
    """Floating point operations of one picture's forward pass."""
    shape = shape_of(spec.dataset, spec.image_size)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        meta_net(spec)(torch.empty(1, shape.channels, shape.size, shape.size, device="meta"))
    return int(counter.get_total_flops())


def _seconds_an_image(spec: VictimSpec, device: torch.device, tflops: float | None) -> float:
    """Of a pass forward and back."""
    if tflops is not None:
        return forward_operations(spec) * (1 + BACKWARD) / (tflops * 1e12)
    shape = shape_of(spec.dataset, spec.image_size)
    net = _net(spec).to(device).train()
    images = torch.rand(BATCH, shape.channels, shape.size, shape.size, device=device)
    labels = torch.zeros(BATCH, dtype=torch.int64, device=device)
    times = []
    for _ in range(1 + TRIED):
        started = time.perf_counter()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        loss.item()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]) / BATCH


@cache
def _forward_passes(settings: DefenceConfig, per_class: int, classes: int) -> float:
    """What one run costs in forward passes of one picture."""
    return operations_of(settings, per_class=per_class, classes=classes)


def _table(costs: Mapping[tuple[str, str], Cost], dollars: float | None) -> Table:
    table = Table(title="device hours", title_justify="left", show_footer=True)
    total = [
        sum(cost.victims for cost in costs.values()),
        sum(cost.training for cost in costs.values()),
        sum(cost.searching for cost in costs.values()),
        sum(cost.judging for cost in costs.values()),
    ]
    hours = sum(total[1:])
    table.add_column("data set", footer="all")
    table.add_column("net")
    heads = ("victims to train", "training", "searches", "judging")
    for name, value in zip(heads, total, strict=True):
        table.add_column(name, justify="right", footer=_shown(value))
    table.add_column("hours", justify="right", footer=_shown(hours))
    if dollars is not None:
        table.add_column("dollars", justify="right", footer=f"{hours * dollars:,.0f}")
    for (dataset, net), cost in costs.items():
        cells = map(_shown, (cost.victims, cost.training, cost.searching, cost.judging, cost.hours))
        price = [] if dollars is None else [f"{cost.hours * dollars:,.0f}"]
        table.add_row(dataset, net, *cells, *price)
    return table


def _shown(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
