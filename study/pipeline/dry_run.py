"""`--dry-run`: what a study would do and cost; nothing is trained and nothing written."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bimask.data import Splits
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.population import PopulationPurifier
from bimask.inspection.trigger_pool import TriggerPool
from study import search
from study.pipeline.prepare import check_data
from study.search.warm_start import read_earlier
from study.spec.config import StudyConfig
from study.spec.reading import load_config
from study.trial.suite import roles

SHOWN, TIMED = 5, 3  # configurations; rounds of a stage


def dry_run(path: Path, overrides: dict[str, Any], *, outputs: Path, console: Console) -> None:
    """Print the space, the victims, the first configurations and an estimate of the seconds.

    Raises:
        BimaskError: for anything that would make the study fail.
    """
    config = load_config(path, overrides)
    check_data(config)
    earlier = read_earlier(config)
    console.print(
        f"[bold]{config.name}[/]: {config.trials} trials of {config.repeats} run(s) a victim, sampler "
        f"{config.sampler}, objectives {', '.join(config.objectives)} ({config.aggregate.rule} over "
        f"the victims); {len(earlier.observed)} trials of earlier studies count, "
        f"{len(earlier.points)} of their points are tried first"
    )
    console.print(_space(config))
    console.print(_victims(config, outputs / "victims"))
    members = search.first_points(config, SHOWN, earlier)
    settings = [config.purify_config(member["parameters"]) for member in members]
    console.print(f"the first {len(members)}, if none of them ended before the last began:")
    for member in members:
        shown = "the paper's defaults" if member["preset"] == search.PAPER else member["parameters"]
        console.print(f"  {member['number']}: {shown}", soft_wrap=True)
    console.print(estimate(config, settings), soft_wrap=True)


def estimate(config: StudyConfig, settings: list[PurifyConfig]) -> str:
    """Seconds of the study, from rounds timed on nets of random weights; and how it was done."""
    torch.set_num_threads(config.cpus_per_trial)
    timed = _nets(config)
    per_trial = [
        config.repeats * sum(seconds_of(one, net, seed=config.seed) for net in timed)
        for one in settings
    ]
    paper = [s for s, one in zip(per_trial, settings, strict=True) if one == PurifyConfig()]
    usual = statistics.fmean([s for s in per_trial if s not in paper] or per_trial)
    at_once = config.concurrency or max(1, (os.cpu_count() or 1) // config.cpus_per_trial)
    search_seconds = (usual * (config.trials - len(paper)) + sum(paper)) / at_once
    searching = config.repeats * sum(net.searching for net in timed)
    searching_at_once = min(at_once, config.repeats * len(timed))
    text = (
        "estimate: "
        + (f"searching triggers {searching / searching_at_once:.0f} s, once; " if searching else "")
        + f"a trial {usual:.0f} s"
        + (f", the paper's defaults {paper[0]:.0f} s" if paper else "")
        + f", the search {search_seconds:.0f} s with {at_once} actors"
    )
    if (asked := config.confirmation) is not None:
        a_run = (usual + searching) / (config.repeats * len(config.victims))
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
        images: the defence's.
        pool: triggers to learn against, where a trial may.
        searching: seconds that they took.
    """

    model: nn.Module
    images: Tensor
    pool: TriggerPool | None = None
    searching: float = 0.0

    def with_pool(self) -> _Net:
        started = time.perf_counter()
        pool = TriggerPool.search(self.model, self.images)
        return replace(self, pool=pool, searching=time.perf_counter() - started)


def _nets(config: StudyConfig) -> list[_Net]:
    """Every net that trials see, untrained where it is a victim's."""
    found: list[tuple[nn.Module, Splits]] = []
    for spec in config.victims:
        splits = spec.load_data()
        found.append((spec.fresh_net(splits.train).eval(), splits))
    if config.suspect is not None:
        suspect = config.suspect.load(config.clean_images_per_class)
        found.append((suspect.model, suspect.load_data()))
    count, seed = config.clean_images_per_class, config.seed
    nets = [_Net(net, splits.train.clean_subset(count, seed=seed).floats()) for net, splits in found]
    return [net.with_pool() for net in nets] if config.may_use("class_triggers") else nets


def seconds_of(settings: PurifyConfig, net: _Net, *, seed: int) -> float:
    """Seconds of one purification, from a few rounds."""
    rounds = {"initialise_rounds": TIMED, "minimise_rounds": 0, "select_rounds": TIMED}
    marks = [time.perf_counter()]

    def mark(*_: Any) -> None:
        marks.append(time.perf_counter())

    PopulationPurifier(
        net.model,
        net.images,
        [settings.model_copy(update=rounds | {"patience": None})],
        generators=[torch.Generator().manual_seed(seed)],
        pool=net.pool,
        on_round=mark,
    ).run()
    spans = [later - earlier for earlier, later in itertools.pairwise(marks)]
    first, second = statistics.median(spans[:TIMED]), statistics.median(spans[TIMED:])
    return (
        first * settings.initialise_rounds
        + second * (settings.minimise_rounds + settings.select_rounds)
    )  # fmt: skip


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
        table.add_row(name, role.replace("_", " "), f"{spec.net}, {spec.width}", spec.digest, there)
    return table
