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
from bimask.commands.purify import numbers
from bimask.commands.terminal import Device, TrustCode, console, progress_bar
from bimask.config import PurifyConfig
from bimask.devices import resolve_device
from bimask.errors import SettingError
from bimask.folders import refuse_existing, whole_folder
from bimask.masked_evidence import MaskedEvidence, masked_evidence
from bimask.own_model import Suspect, load_suspect, suspect_of
from bimask.purify import purify
from bimask.victim import load_victim


def audit_command(
    model: Annotated[
        Path | None, typer.Option(help="Your own weights: .safetensors, or tensors in .pt, .pth.")
    ] = None,
    net: Annotated[
        str | None, typer.Option(help="Its net: FILE.py:factory, package.module:factory or a name.")
    ] = None,
    clean: Annotated[Path | None, typer.Option(help="Folder of clean pictures.")] = None,
    out: Annotated[Path, typer.Option(help="New folder for the report.")] = Path("audit"),
    classes: Annotated[int | None, typer.Option(help="How many; default: class folders.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels to bring pictures to.")] = None,
    channels: Annotated[int, typer.Option(help="3, or 1 for grey pictures.")] = 3,
    width: Annotated[int | None, typer.Option(help="Of the net, where it takes one.")] = None,
    mean: Annotated[str | None, typer.Option(help="Your normalisation: 0.485,0.456,0.406")] = None,
    std: Annotated[str | None, typer.Option(help="and 0.229,0.224,0.225; default: none.")] = None,
    victim: Annotated[Path | None, typer.Option(help="Instead of your own: a victim's folder.")] = None,
    clean_images_per_class: Annotated[int, typer.Option(help="With --victim.")] = 3,
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
    if victim is not None and model is None:
        found = load_victim(victim, own_code=trust_code)
        suspect = suspect_of(found, found.spec.load_data(), clean_images_per_class, seed=seed)
    elif model is not None and net is not None and clean is not None and victim is None:
        suspect = load_suspect(
            model,
            net,
            clean,
            classes=classes,
            channels=channels,
            image_size=image_size,
            width=width,
            mean=numbers("--mean", mean),
            std=numbers("--std", std),
        )
    else:
        raise SettingError("Give your own model as --model, --net and --clean, or a --victim.")
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
