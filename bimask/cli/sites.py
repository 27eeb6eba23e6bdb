"""`python -m bimask sites`."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.table import Table

from bimask.cli.suspects import (
    Channels,
    Choice,
    Classes,
    Clean,
    ImageSize,
    KnownVictim,
    Mean,
    Model,
    Net,
    Std,
    Width,
)
from bimask.cli.terminal import console
from bimask.commands import TrustCode
from bimask.masking.coverage import coverage
from bimask.masking.discovery import Which, candidates, masks_for


def sites_command(
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
    sites: Annotated[
        list[str] | None,
        typer.Option(help="published, all, or kinds and names with *; may be given several times."),
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """List where a model can be masked, and what a setting of `sites` would mask."""
    choice = Choice(model, net, clean, classes, image_size, channels, width, mean, std, victim)
    suspect, _, _ = choice.load(1, seed=0, trust_code=trust_code, device=torch.device("cpu"))
    images = suspect.clean.floats()[:4]
    masks = masks_for(suspect.model, images, _which(sites))
    table = Table("site", "kind", "channels", "masked")
    for site in candidates(suspect.model, images):
        how = "as a gate" if site.key in masks.gates else "yes"
        table.add_row(site.key, site.kind, str(site.channels), how if site.key in masks.sites else "no")
    console.print(table)
    reached = coverage(suspect.model, masks, images)
    console.tell(f"{reached}")
    if reached.warning:
        console.tell(reached.warning, mark="warning", style="bold yellow")


def _which(sites: list[str] | None) -> Which:
    """The setting that the option's values stand for."""
    if sites is None or sites == ["all"]:
        return "all"
    return "published" if sites == ["published"] else tuple(sites)
