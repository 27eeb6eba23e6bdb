"""`python -m bimask purify`."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import nn

from bimask.cleaned.before_after import BeforeAfter, before_after
from bimask.cleaned.folder import save_cleaned
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
    read_settings,
)
from bimask.cli.terminal import console, progress_bar, score_table
from bimask.commands import Device, TrustCode
from bimask.data import Splits
from bimask.defences import DEFENCES
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.purify import defence_of, defend
from bimask.devices import resolve_device
from bimask.errors import SettingError
from bimask.files.atomic import refuse_existing
from bimask.inspection.held_back import FEWEST, HeldBack, held_back_evidence
from bimask.inspection.suspect import CleanImages, Suspect, hold_back
from bimask.masking.coverage import coverage
from bimask.metrics import evaluate
from bimask.nets.answers import logits_of
from bimask.nets.cleaned import MODEL, REPORT

NOTHING = {
    True: "no mask moved away from 1, or none that the answers depend on",
    False: "no weight moved, or none that the answers depend on",
}
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
    pictures: Annotated[
        Path | None,
        typer.Option(help="Of a detector: folder of the pictures, if not the annotations'."),
    ] = None,
    label_ids: Annotated[
        str | None, typer.Option(help="Of a detector: what it calls the classes, in order: 1,2,3.")
    ] = None,
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

    Give your own model as --model, --net and --clean, or one of known trigger as --victim. It is a
    detector if --clean has annotations: COCO's JSON, or a folder in VOC's form.
    """
    refuse_existing(out)
    where = resolve_device(device)
    choice = Choice(model, net, clean, classes, image_size, channels, width, mean, std, victim)
    if choice.of_detector:
        from bimask.cli.detectors import purify_detector  # torchvision takes a second

        purify_detector(
            out,
            config,
            choice,
            pictures=pictures,
            label_ids=label_ids,
            clean_images_per_class=clean_images_per_class,
            held_back=held_back,
            seed=seed,
            inverse=inverse,
            device=where,
            trust_code=trust_code,
        )
        return
    if pictures is not None or label_ids is not None:
        raise SettingError("--pictures and --label-ids go with annotations of a detector as --clean.")
    settings, seed = read_settings(config, seed, DEFENCES, PurifyConfig.profile("robust"))
    suspect, splits, sets = choice.load(
        clean_images_per_class, seed=seed, trust_code=trust_code, device=where
    )
    moved = copy.deepcopy(suspect.model).to(where)
    suspect, held = _parts(suspect, splits, moved, held_back, seed)
    images = suspect.clean.floats().to(where)
    defence, labels = defence_of(settings), suspect.clean.labels
    if inverse and not defence.has_twin:
        raise SettingError(f"The defence {defence.name} has no inverse twin; leave --inverse out.")
    prepared = None
    preparation = defence.preparation(lambda name: bool(getattr(settings, name)))
    if preparation is not None:
        steps = preparation.steps(len(suspect.classes), len(images))
        with progress_bar(preparation.doing, steps) as advance:
            prepared = preparation.make(moved, images, on_step=lambda: advance(1))
    with progress_bar("rounds", settings.steps(len(images))) as advance:
        result = defend(
            moved,
            images,
            settings,
            labels=None if labels is None else labels.to(where),
            generator=torch.Generator().manual_seed(seed),
            prepared=prepared,
            on_step=lambda _log, _current: advance(1),
        )
    masks = defence.masks(result.tensors, settings)
    if masks is not None:
        reached = coverage(moved, masks, images[:4])
        console.tell(f"{reached}")
        if reached.warning is not None:
            console.tell(reached.warning, mark="warning", style="bold yellow")
    purified, twin = result.model(), defence.twin(moved, result.tensors, settings)
    if not result.changed or torch.equal(logits_of(purified, images), logits_of(moved, images)):
        console.tell(
            f"{NOTHING[masks is not None]}, so the model answers as before; nothing was written. Try "
            "other settings" + (", or more `sites`." if masks is not None else "."),
            mark="nothing changed",
            style="bold red",
        )
        raise typer.Exit(1)
    own = settings if isinstance(settings, PurifyConfig) else None
    looked = before_after(moved, purified, images, labels, twin=twin, config=own)
    scores = None
    if sets is not None:
        there = sets.to(where)
        scores = {"before": evaluate(moved, there), "after": evaluate(purified, there)}
    seen = held_back_evidence(moved, purified, held)
    suspect.model.cpu()
    save_cleaned(
        out, suspect, result, looked, seed=seed, inverse=inverse, scores=scores, held_back=seen
    )
    _look_table(looked, suspect.classes)
    _held_back_table(seen, held)
    if scores is not None:
        score_table(scores)
    console.tell(f"cleaned model: {out / MODEL}")
    console.tell(f"report: {out / REPORT}")


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


def _look_table(looked: BeforeAfter, classes: tuple[str, ...]) -> None:
    table = Table(
        "on the pictures learned on", "ACC %", "as suspect %", "perturbed: changed %", "most frequent"
    )
    for name, row in (("before", looked.before), ("after", looked.after)):
        accuracy = "no labels" if row.accuracy is None else f"{100 * row.accuracy:.1f}"
        favourite = f"{classes[row.favourite]} {100 * row.favourite_share:.1f} %"
        table.add_row(
            name, accuracy, f"{100 * row.agreement:.1f}", f"{100 * row.changed:.1f}", favourite
        )
    console.print(table)


def _held_back_table(seen: HeldBack | None, held: CleanImages) -> None:
    if seen is None:
        console.tell(
            f"risk was not measured: {len(held.images)} pictures are held back, {FEWEST} or more are "
            "needed; give more pictures, or a larger --held-back."
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
        console.tell(seen.reason)
