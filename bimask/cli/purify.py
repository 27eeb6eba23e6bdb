"""`python -m bimask purify`."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from rich.markup import escape
from rich.table import Table
from torch import nn

from bimask.cleaned.before_after import BeforeAfter, before_after
from bimask.cleaned.folder import MODEL, REPORT, save_cleaned
from bimask.cli.suspects import (
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
from bimask.cli.terminal import Device, TrustCode, console, progress_bar, score_table
from bimask.data import Splits
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.purify import purify
from bimask.devices import resolve_device
from bimask.errors import SettingError
from bimask.files.folders import refuse_existing
from bimask.inspection.held_back import FEWEST, HeldBack, held_back_evidence
from bimask.inspection.suspect import CleanImages, Suspect, hold_back
from bimask.inspection.trigger_pool import TriggerPool
from bimask.masking.coverage import coverage
from bimask.masking.masks import fold
from bimask.metrics import evaluate
from bimask.nets.answers import logits_of

VAL_PER_CLASS = 5  # pictures of a victim's `val` that risk is measured on


def purify_command(
    out: Annotated[Path, typer.Option(help="New folder for the cleaned model.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML with settings, such as best.yaml; default: the profile `robust`."),
    ] = None,
    model: Model = None,
    net: Net = None,
    clean: Clean = None,
    classes: Classes = None,
    image_size: ImageSize = None,
    channels: Channels = None,
    width: Width = None,
    mean: Mean = None,
    std: Std = None,
    victim: KnownVictim = None,
    clean_images_per_class: CleanImagesPerClass = 10,
    held_back: Annotated[
        float,
        typer.Option(
            min=0, max=0.9, help="Share of your own pictures that risk and accuracy are measured on."
        ),
    ] = 0.2,
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
    suspect, splits, sets = choice.load(
        clean_images_per_class, seed=seed, trust_code=trust_code, device=where
    )
    moved = copy.deepcopy(suspect.model).to(where)
    suspect, held = _parts(suspect, splits, moved, held_back, seed)
    images = suspect.clean.floats().to(where)
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
    reached = coverage(moved, result.masks, images[:4])
    console.print(f"{reached}", highlight=False, soft_wrap=True)
    if reached.warning is not None:
        console.print(f"[bold yellow]warning[/]: {escape(reached.warning)}", soft_wrap=True)
    purified = fold(moved, result.masks)
    if not result.changed or torch.equal(logits_of(purified, images), logits_of(moved, images)):
        console.print(
            "[bold red]nothing changed[/]: no mask moved away from 1, or none that the answers depend "
            "on, so the model answers as before; nothing was written. Try other settings, or more "
            "`sites`.",
            soft_wrap=True,
        )
        raise typer.Exit(1)
    looked = before_after(moved, result.masks, images, suspect.clean.labels, settings)
    scores = None
    if sets is not None:
        there = sets.to(where)
        scores = {"before": evaluate(moved, there), "after": evaluate(purified, there)}
    seen = held_back_evidence(moved, result.masks, held)
    suspect.model.cpu()
    save_cleaned(
        out, suspect, result, looked, seed=seed, inverse=inverse, scores=scores, held_back=seen
    )
    _look_table(looked, suspect.classes)
    _held_back_table(seen, held)
    if scores is not None:
        score_table(scores)
    console.print(f"cleaned model: {escape(str(out / MODEL))}", soft_wrap=True)
    console.print(f"report: {escape(str(out / REPORT))}", soft_wrap=True)


def _parts(
    suspect: Suspect, splits: Splits | None, model: nn.Module, share: float, seed: int
) -> tuple[Suspect, CleanImages]:
    """The suspect with the pictures to learn on, and those to look at the result with: of a victim
    pictures of `val`, of a user's own a share of them."""
    if splits is not None:
        fewest = int(splits.val.labels.bincount(minlength=splits.val.num_classes).min())
        val = splits.val.clean_subset(max(1, min(VAL_PER_CLASS, fewest)), seed=seed)
        return suspect, CleanImages(val.images, val.labels)
    answers = logits_of(model, suspect.clean.floats().to(next(model.parameters()).device)).argmax(1)
    learned, held = hold_back(suspect.clean, answers, share)
    return replace(suspect, clean=learned), held


def read_settings(config: Path | None, seed: int | None) -> tuple[PurifyConfig, int]:
    """The settings in a YAML file, or the profile `robust`, and the file's seed, unless one is
    given."""
    if config is None:
        return PurifyConfig.profile("robust"), seed or 0
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
        "on the pictures learned on", "ACC %", "as suspect %", "perturbed: changed %", "most frequent"
    )
    for name, row in (("before", looked.before), ("after", looked.after)):
        accuracy = "no labels" if row.accuracy is None else f"{100 * row.accuracy:.1f}"
        favourite = f"{escape(classes[row.favourite])} {100 * row.favourite_share:.1f} %"
        table.add_row(
            name, accuracy, f"{100 * row.agreement:.1f}", f"{100 * row.changed:.1f}", favourite
        )
    console.print(table)


def _held_back_table(seen: HeldBack | None, held: CleanImages) -> None:
    if seen is None:
        console.print(
            f"risk was not measured: {len(held.images)} pictures are held back, {FEWEST} or more are "
            "needed; give more pictures, or a larger --held-back.",
            soft_wrap=True,
        )
        return
    table = Table("on pictures held back", "ACC %", "as suspect %", "risk", "n")
    for name, risk, accuracy, agreement in (
        ("before", 1.0, seen.accuracy_before, 1.0),
        ("after", seen.risk, seen.accuracy_after, seen.agreement),
    ):
        shown = "no labels" if accuracy is None else f"{100 * accuracy:.1f}"
        told = "unknown" if risk is None else f"{risk:.2f}"
        table.add_row(name, shown, f"{100 * agreement:.1f}", told, str(seen.images))
    console.print(table)
    if seen.reason:
        console.print(escape(seen.reason), soft_wrap=True)
