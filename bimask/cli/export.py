"""`python -m bimask export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from bimask.cleaned.compact import compact
from bimask.cleaned.export import FOLDED, export_onnx, export_program, require_equal
from bimask.cleaned.folder import load_cleaned
from bimask.cli.terminal import console
from bimask.commands import TrustCode
from bimask.errors import SettingError
from bimask.inspection.suspect import read_clean

WRITERS = {".onnx": export_onnx, ".pt2": export_program}
NOISE = 64  # images to check on where none are given


def export_command(
    cleaned: Annotated[Path, typer.Argument(help="Folder that `purify` wrote.")],
    out: Annotated[Path, typer.Argument(help="FILE.onnx, or FILE.pt2 for torch.export.")],
    images: Annotated[
        Path | None, typer.Option(help="Pictures to check the file on; default: noise.")
    ] = None,
    compact_: Annotated[
        bool, typer.Option("--compact", help="Without channels that the masks made exactly zero.")
    ] = False,
    trust_code: TrustCode = False,
) -> None:
    """Write a cleaned model as ONNX or torch.export, checked, for any number of images at once."""
    if out.suffix not in WRITERS:
        raise SettingError(f"The file must end in {' or '.join(WRITERS)}, got {out}.")
    if out.exists():
        raise SettingError(f"{out} exists; give a new file.")
    read = load_cleaned(cleaned, own_code=trust_code)
    if images is None:
        checked = torch.rand(NOISE, *read.shape, generator=torch.Generator().manual_seed(0))
    else:
        channels, *sides = read.shape
        checked = read_clean(images, channels=channels, image_size=(sides[0], sides[1]))[0].floats()
    model = read.model
    if compact_:
        small = compact(model)
        model = small.model
        with torch.no_grad():
            require_equal(model(checked), read.model(checked), FOLDED, "The compact model")
        console.tell(
            f"{small.removed} of {small.channels} channels removed; {small.dead} are exactly zero"
        )
    error = WRITERS[out.suffix](model, checked, out)
    console.tell(f"{out}: logits of {len(checked)} images differ by {error:.1e} at most")
