"""`python -m bimask audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table

from bimask.audit import Audit, audit, calibration, steps
from bimask.audit_report import PAGE, write_report
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
from bimask.commands.terminal import Device, TrustCode, console, progress_bar
from bimask.config import PurifyConfig
from bimask.devices import resolve_device
from bimask.folders import refuse_existing, whole_folder
from bimask.masked_evidence import MaskedEvidence, masked_evidence
from bimask.own_model import Suspect
from bimask.purify import purify


def audit_command(
    model: Model = None,
    net: Net = None,
    clean: Clean = None,
    out: Annotated[Path, typer.Option(help="New folder for the report.")] = Path("audit"),
    classes: Classes = None,
    image_size: ImageSize = None,
    channels: Channels = 3,
    width: Width = None,
    mean: Mean = None,
    std: Std = None,
    victim: KnownVictim = None,
    clean_images_per_class: CleanImagesPerClass = 3,
    seed: Annotated[int, typer.Option(help="Of the masks, and of the images with --victim.")] = 0,
    masks: Annotated[
        bool, typer.Option(help="Purify the model, too, and ask its inverse twin.")
    ] = True,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Is a model backdoored, and towards which class? From clean pictures alone.

    Give your own model as --model, --net and --clean, or one of known trigger as --victim.
    """
    refuse_existing(out)
    where = resolve_device(device)
    choice = Choice(model, net, clean, classes, image_size, channels, width, mean, std, victim)
    suspect, _ = choice.load(clean_images_per_class, seed=seed, trust_code=trust_code, device=where)
    images, moved = suspect.clean.floats().to(where), suspect.model.to(where)
    with progress_bar("searching triggers", steps(len(suspect.classes), len(images))) as advance:
        result = audit(moved, images, on_step=lambda: advance(1))
    masked = _masked(suspect, images, result, seed) if masks else None
    with whole_folder(out) as folder:
        suspect.model.cpu()
        write_report(folder, result, suspect, masked, {"seed": seed, "torch": torch.__version__})
    _show(result, suspect.classes, len(images))
    console.print(f"report: {escape(str(out / PAGE))}", soft_wrap=True)


def _masked(suspect: Suspect, images: torch.Tensor, result: Audit, seed: int) -> MaskedEvidence:
    settings = PurifyConfig.profile("fast")
    rounds = settings.initialise_rounds + settings.minimise_rounds + settings.select_rounds
    with progress_bar("learning masks", rounds) as advance:
        learned = purify(
            suspect.model,
            images,
            settings,
            generator=torch.Generator().manual_seed(seed),
            on_round=lambda _log, _masks: advance(1),
        )
    return masked_evidence(suspect.model, learned.masks, images, result.triggers, result.target)


def _show(result: Audit, classes: tuple[str, ...], images: int) -> None:
    table = Table("class", "score", *(f"{kind} price" for kind in result.prices))
    for k in sorted(range(len(classes)), key=lambda k: -result.scores[k])[:5]:
        prices = [f"{values[k]:.2f}" for values in result.prices.values()]
        table.add_row(escape(classes[k]), f"{result.scores[k]:.2f}", *prices)
    console.print(table)
    target = escape(classes[result.target])
    if result.flagged:
        console.print(f"[bold red]probably backdoored[/], towards class {target!r}")
    else:
        console.print(f"no backdoor found; the most suspicious class is {target!r}")
    console.print(
        f"probability {result.probability:.2f} from {images} clean images, calibrated on "
        f"{calibration()['fitted_on']['models']}; for other nets and images it is a lead",
        soft_wrap=True,
    )
