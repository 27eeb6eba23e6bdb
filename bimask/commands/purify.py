"""`python -m bimask purify`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from rich.markup import escape
from rich.table import Table

from bimask.before_after import BeforeAfter, before_after
from bimask.cleaned import MODEL, REPORT, save_cleaned
from bimask.commands.suspects import (
    Channels,
    Choice,
    Classes,
    Clean,
    CleanImagesPerClass,
    ImageSize,
    KnownVictim,
    Mean,
    Model,
    Net,
    Std,
    Width,
)
from bimask.commands.terminal import Device, TrustCode, console, progress_bar, score_table
from bimask.config import PurifyConfig
from bimask.devices import resolve_device
from bimask.errors import SettingError
from bimask.folders import refuse_existing
from bimask.metrics import evaluate
from bimask.purify import purify
from bimask.trigger_pool import TriggerPool


def purify_command(
    config: Annotated[Path, typer.Option(help="YAML with settings, such as best.yaml.")],
    out: Annotated[Path, typer.Option(help="New folder for the cleaned model.")],
    model: Model = None,
    net: Net = None,
    clean: Clean = None,
    classes: Classes = None,
    image_size: ImageSize = None,
    channels: Channels = 3,
    width: Width = None,
    mean: Mean = None,
    std: Std = None,
    victim: KnownVictim = None,
    clean_images_per_class: CleanImagesPerClass = 10,
    seed: Annotated[int | None, typer.Option(help="Default: the configuration's, or 0.")] = None,
    inverse: Annotated[bool, typer.Option("--inverse", help="Write the inverse twin, too.")] = False,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Purify a model: plain weights under the same names, its masks, a report, before and after.

    Give your own model as --model, --net and --clean, or one of known trigger as --victim.
    """
    settings, seed = read_settings(config, seed)
    refuse_existing(out)
    where = resolve_device(device)
    choice = Choice(model, net, clean, classes, image_size, channels, width, mean, std, victim)
    suspect, sets = choice.load(clean_images_per_class, seed=seed, trust_code=trust_code, device=where)
    images = suspect.clean.floats().to(where)
    moved = copy.deepcopy(suspect.model).to(where)
    pool = None
    if settings.class_triggers:
        steps = TriggerPool.steps(len(suspect.classes), len(images))
        with progress_bar("searching triggers", steps) as advance:
            pool = TriggerPool.search(moved, images, on_step=lambda: advance(1))
    rounds = settings.initialise_rounds + settings.minimise_rounds + settings.select_rounds
    with progress_bar("rounds", rounds) as advance:
        result = purify(
            moved,
            images,
            settings,
            generator=torch.Generator().manual_seed(seed),
            pool=pool,
            on_round=lambda _log, _masks: advance(1),
        )
    looked = before_after(moved, result.masks, images, suspect.clean.labels, settings)
    scores = None
    if sets is not None:
        there = sets.to(where)
        scores = {"before": evaluate(moved, there), "after": evaluate(result.model(), there)}
    save_cleaned(out, suspect, result, looked, seed=seed, inverse=inverse, scores=scores)
    _look_table(looked, suspect.classes)
    if scores is not None:
        score_table(scores)
    console.print(f"cleaned model: {escape(str(out / MODEL))}", soft_wrap=True)
    console.print(f"report: {escape(str(out / REPORT))}", soft_wrap=True)


def read_settings(config: Path, seed: int | None) -> tuple[PurifyConfig, int]:
    """The settings in a YAML file and its seed, unless one is given."""
    if str(config).startswith("models:"):
        raise SettingError(
            f"{config} is in MLflow's registry, which `bimask` knows nothing of; use `python -m "
            "study.purify` with the same options."
        )
    settings = PurifyConfig.from_yaml(config)
    if seed is None:
        seed = yaml.safe_load(config.read_text()).get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise SettingError(f"`seed` must be a whole number >= 0, got {seed!r}.")
    return settings, seed


def _look_table(looked: BeforeAfter, classes: tuple[str, ...]) -> None:
    table = Table(
        "on the clean images", "ACC %", "as suspect %", "perturbed: changed %", "most frequent"
    )
    for name, row in (("before", looked.before), ("after", looked.after)):
        accuracy = "no labels" if row.accuracy is None else f"{100 * row.accuracy:.1f}"
        favourite = f"{escape(classes[row.favourite])} {100 * row.favourite_share:.1f} %"
        table.add_row(
            name, accuracy, f"{100 * row.agreement:.1f}", f"{100 * row.changed:.1f}", favourite
        )
    console.print(table)
