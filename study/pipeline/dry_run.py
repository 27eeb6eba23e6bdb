"""`--dry-run`: what a study would do and cost; nothing is trained and nothing written.

Code that the study names is not run without --trust-code; rounds of the library's own nets are timed.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bimask.data import Splits
from bimask.defences.base import CleanData, Preparation, StepLog
from bimask.defences.settings import DefenceConfig
from bimask.nets import build_net, may_run
from bimask.progress import Console
from bimask.tasks import defence_of
from study import search
from study.pipeline.choosing import accepted
from study.pipeline.opening import say
from study.pipeline.prepare import check_data, preparations
from study.search.warm_start import read_earlier
from study.spec.config import PAPER, StudyConfig
from study.spec.reading import load_config
from study.store.schema import Member
from study.trial.suite import roles

SHOWN, TIMED = 5, 3  # configurations; rounds of a stage
MOST_COUNTED = 64  # pictures


def dry_run(path: Path, overrides: Mapping[str, object], *, outputs: Path, console: Console) -> None:
    """Print the space, the victims, the first configurations and an estimate of the seconds.

    Raises:
        BimaskError: for anything that would make the study fail.
    """
    config = accepted(load_config(path, overrides), partial(say, console))
    check_data(config)
    earlier = read_earlier(config)
    console.tell(
        f"{config.trials} trials of {config.repeats} run(s) a victim, sampler "
        f"{config.sampler}, objectives {', '.join(config.objectives)} ({config.aggregate.rule} over "
        f"the victims); {len(earlier.observed)} trials of earlier studies count, "
        f"{len(earlier.points)} of their points are tried first",
        mark=config.name,
        style="bold",
    )
    console.print(_space(config))
    console.print(_victims(config, outputs / "victims"))
    # one of each defence at least, and each of their published defaults
    papers = len(config.defenders.names) if config.paper_defaults else 0
    begun = papers + len(config.start) if config.defenders.several else 0
    members = search.first_points(config, max(SHOWN, begun), earlier)
    console.tell(f"the first {len(members)}, if none of them ended before the last began:")
    for member in members:
        shown: object = member["parameters"]
        if member["preset"] == search.PAPER:
            name = config.defenders.name_of(member["parameters"])
            shown = "the paper's defaults" + (f" of {name}" if config.defenders.several else "")
        console.tell(f"  {member['number']}: {shown}")
    nets = [one.net for one in ([config.suspect] if config.suspect else config.suite)]
    if own := [net for net in nets if not may_run(net)]:
        console.tell(
            f"estimate: none. The net {own[0]!r} is code, and a dry run runs none; to have rounds of "
            "it timed, add --trust-code."
        )
        return
    console.tell(estimate(config, members))


def estimate(config: StudyConfig, members: Sequence[Member]) -> str:
    """Seconds of the study, from rounds timed on nets of random weights; and how it was done."""
    torch.set_num_threads(config.cpus_per_trial)
    timed, papers = _nets(config), [member["preset"] == PAPER for member in members]
    settings = [config.defence_config(member["parameters"]) for member in members]
    per_trial = [
        sum(seconds_of(one, net, seed=config.seed) for net in timed)
        * config.repeats_of(member["preset"])
        for one, member in zip(settings, members, strict=True)
    ]
    paper = [seconds for seconds, is_paper in zip(per_trial, papers, strict=True) if is_paper]
    searched: dict[str, list[float]] = {}  # the mean over the defences: each may be drawn as often
    for seconds, is_paper, one in zip(per_trial, papers, settings, strict=True):
        if not is_paper or all(papers):
            searched.setdefault(defence_of(one).name, []).append(seconds)
    usual = statistics.fmean(statistics.fmean(mine) for mine in searched.values())
    at_once = config.concurrency or max(1, (os.cpu_count() or 1) // config.cpus_per_trial)
    in_trials = usual * (config.trials - len(paper)) + sum(paper)
    search_seconds = min(in_trials, config.search_seconds or in_trials) / at_once
    preparing = config.repeats * sum(net.preparing for net in timed)
    preparing_at_once = min(at_once, config.repeats * len(timed))
    made = preparations(config).values()
    text = (
        "estimate: "
        + (
            f"{' and '.join(one.doing for one in made)} {preparing / preparing_at_once:.0f} s, once; "
            if made
            else ""
        )
        + f"a trial {usual:.0f} s"
        + (f", the paper's defaults {sum(paper):.0f} s" if paper else "")
        + f", the search {search_seconds:.0f} s with {at_once} actors"
    )
    if (asked := config.confirmation) is not None:
        a_run = (usual + preparing) / (config.repeats * len(config.victims))
        text += f", the confirmation {a_run * asked.seeds * len(config.suite) / at_once:.0f} s"
        text += " and the paper's defaults beside it" if config.paper_defaults else ""
    return text + (
        f". {TIMED} rounds of each kind were timed with these configurations on untrained nets, here "
        "and now, and multiplied; scoring, the training of new victims and Ray's start are not in it, "
        "and trials that end or are stopped early take less."
    )


@dataclass(frozen=True)
class _Net:
    """What is timed in a victim's place.

    Attributes:
        clean: the defence's, with labels, which some are not handed.
        prepared: defence -> what it makes of a victim beforehand, where it does.
        preparing: seconds that all of it took.
    """

    model: nn.Module
    clean: CleanData
    prepared: Mapping[str, Any] = field(default_factory=dict)
    preparing: float = 0.0

    def ready(self, preparations: Mapping[str, Preparation]) -> _Net:
        started = time.perf_counter()
        prepared = {name: one.make(self.model, self.clean.images) for name, one in preparations.items()}
        return replace(self, prepared=prepared, preparing=time.perf_counter() - started)


def _nets(config: StudyConfig) -> list[_Net]:
    """Every net that trials see, untrained where it is a victim's."""
    found: list[tuple[nn.Module, Splits]] = []
    for spec in config.victims:
        splits = spec.load_data()
        found.append((config.task.fresh_net(spec, splits.train).eval(), splits))
    if config.suspect is not None:
        suspect = config.suspect.load(config.clean_images_per_class)
        found.append((suspect.model, suspect.load_data()))
    count, seed = config.clean_images_per_class, config.seed
    made, nets = preparations(config), []
    for net, splits in found:
        clean = splits.train.clean_subset(count, seed=seed)
        nets.append(_Net(net, CleanData(clean.floats(), clean.labels)).ready(made))
    return nets


def seconds_of(settings: DefenceConfig, net: _Net, *, seed: int) -> float:
    """Seconds of one run, from a few steps of every kind."""
    return _spent(settings, net, time.perf_counter, seed=seed)


def operations_of(settings: DefenceConfig, *, per_class: int, classes: int) -> float:
    """What one run costs in forward passes of one picture, counted on a tiny net: as many passes as on
    any other, but for what a defence prepares, and does with weights alone.

    Of more than `MOST_COUNTED` pictures so many are counted; the rest follows from steps and batch.
    """
    torch.set_num_threads(1)
    labels = torch.arange(classes).repeat_interleave(per_class)
    count = min(len(labels), MOST_COUNTED)
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    net = build_net("small_resnet", in_channels=1, num_classes=classes, width=2, mean=[0], std=[1])
    tiny = _Net(net.eval(), CleanData(images, labels[:count]))
    with Operations() as one, torch.no_grad():
        net(images[:1])
    with Operations() as all_, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings, which a study tells
        spent = _spent(settings.unprepared(), tiny, lambda: all_.count, seed=0)
    more = settings.steps(len(labels)) / settings.steps(count)
    if more == 1 and getattr(settings, "batch_size", None) is None:
        more = len(labels) / count
    return more * spent / one.count


class Operations(TorchDispatchMode):
    """Counts floating point operations of products and convolutions, forward and back.

    `FlopCounterMode` does, too, but follows modules by hooks, under which some gradients fail.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.count += count(*args, **(kwargs or {}), out_val=found)
        return found


def _spent(settings: DefenceConfig, net: _Net, clock: Callable[[], float], *, seed: int) -> float:
    """What a run takes of what the clock counts, from a few steps of every kind."""
    spent, defence = 0.0, defence_of(settings)
    clean = net.clean if defence.needs_labels else replace(net.clean, labels=None)
    for short, stands_for in settings.samples(TIMED, len(net.clean.images)):
        marks = [clock()]

        def mark(_member: int, _log: StepLog, _current: Any, marks: list[float] = marks) -> bool:
            marks.append(clock())
            return len(marks) > TIMED

        defence.run(
            net.model,
            clean,
            [short],
            generators=[torch.Generator().manual_seed(seed)],
            prepared=net.prepared.get(defence.name),
            on_step=mark,
        )
        if len(marks) == 1:  # a defence without steps
            marks.append(clock())
        spent += stands_for * statistics.median(b - a for a, b in itertools.pairwise(marks))
    return spent


def _space(config: StudyConfig) -> Table:
    table = Table(title="space", title_justify="left")
    for column in ("setting", "kind", "values", "only where"):
        table.add_column(column)
    for name, parameter in config.space.items():
        values = parameter.model_dump(exclude={"kind", "when"})
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        table.add_row(name, parameter.kind, shown, str(parameter.when or ""))
    return table


def _victims(config: StudyConfig, root: Path) -> Table:
    if config.suspect is not None:
        table = Table(title="suspect", title_justify="left")
        for column in ("weights", "net", "clean pictures", "digest"):
            table.add_column(column)
        one = config.suspect
        table.add_row(one.model, one.net, one.clean, one.digest)
        return table
    table = Table(title="victims", title_justify="left")
    for column in ("victim", "role", "net", "digest", "there"):
        table.add_column(column)
    for (name, role), spec in zip(roles(config).items(), config.suite, strict=True):
        there = "yes" if (root / spec.digest).is_dir() else "to be trained"
        there = "given" if spec.given else there
        net = f"{spec.net}, {spec.width}"
        table.add_row(name, role.replace("_", " "), net, spec.digest, there)
    return table
