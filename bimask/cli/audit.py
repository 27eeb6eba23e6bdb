"""`python -m bimask audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from rich.text import Text

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
from bimask.cli.terminal import console, progress_bar
from bimask.commands import Device, TrustCode
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.purify import purify
from bimask.devices import resolve_device
from bimask.files.atomic import atomic_directory, refuse_existing
from bimask.inspection.audit import UNSEEN, Audit, audit, calibration, steps
from bimask.inspection.audit_report import PAGE, write_report
from bimask.inspection.masked_evidence import MaskedEvidence, masked_evidence
from bimask.inspection.suspect import Suspect

SHOWN = 5  # classes in the table


def audit_command(
    model: Model = None,
    net: Net = None,
    clean: Clean = None,
    out: Annotated[Path, typer.Option(help="New folder for the report.")] = Path("audit"),
    classes: Classes = None,
    image_size: ImageSize = None,
    channels: Channels = None,
    width: Width = None,
    mean: Mean = None,
    std: Std = None,
    victim: KnownVictim = None,
    clean_images_per_class: CleanImagesPerClass = 3,
    seed: Annotated[int, typer.Option(help="Of the masks, and of the images with --victim.")] = 0,
    masks: Annotated[
        bool, typer.Option(help="Purify the model, too, and ask its inverse twin.")
    ] = False,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Is a model backdoored, and towards which class? From clean pictures alone.

    The verdict is "backdoored", "no sign", or "unknown" for models unlike those of the calibration.

    Give your own model as --model, --net and --clean, or one of known trigger as --victim.
    """
    refuse_existing(out)
    where = resolve_device(device)
    choice = Choice(model, net, clean, classes, image_size, channels, width, mean, std, victim)
    suspect, _, _ = choice.load(clean_images_per_class, seed=seed, trust_code=trust_code, device=where)
    images, moved = suspect.clean.floats().to(where), suspect.model.to(where)
    with progress_bar("searching triggers", steps(len(suspect.classes), len(images))) as advance:
        result = audit(moved, images, on_step=lambda: advance(1))
    masked = _masked(suspect, images, result, seed) if masks else None
    with atomic_directory(out) as folder:
        suspect.model.cpu()
        write_report(folder, result, suspect, masked, {"seed": seed, "torch": torch.__version__})
    _show(result, suspect.classes, len(images))
    console.tell(f"report: {out / PAGE}")


def _masked(suspect: Suspect, images: torch.Tensor, result: Audit, seed: int) -> MaskedEvidence:
    settings = PurifyConfig.profile("fast", sites="all")
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


def _show(result: Audit, classes: tuple[str, ...], given: int) -> None:
    kinds = list(result.evidence)
    table = Table("class", "score", *kinds, title="evidence by class; its prices are in the report")
    for k in sorted(range(len(classes)), key=lambda k: -result.scores[k])[:SHOWN]:
        numbers = [result.scores[k], *(result.evidence[kind][k] for kind in kinds)]
        table.add_row(classes[k], *(f"{number:.2f}" for number in numbers))
    console.print(table)
    colour = {"backdoored": "bold red", "no sign": "bold", "unknown": "bold yellow"}[result.verdict]
    chance = "" if result.verdict == "unknown" else f" (probability {result.probability:.2f})"
    said = {
        "backdoored": f"backdoored{chance}",
        "no sign": f"no sign of a backdoor{chance}",
        "unknown": "unknown; there is evidence, and no verdict",
    }[result.verdict]
    console.print(Text.assemble("verdict: ", (said, colour)), soft_wrap=True)
    lines = [
        *(f"- {reason}" for reason in result.reasons),
        f"suspected class: {classes[result.target]!r}",
        f"{result.kind.images} of {given} clean images were looked at closely; calibrated on "
        f"{calibration()['fitted_on']['models']}.",
        UNSEEN,
    ]
    for line in lines:
        console.tell(line)
