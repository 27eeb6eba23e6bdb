"""`python -m bimask gallery`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bimask.cli.terminal import console
from bimask.commands import TrustCode
from bimask.errors import SettingError
from bimask.files.drawn import save_figure
from bimask.victims import open_victim


def gallery_command(
    victim: Annotated[Path, typer.Argument(help="Folder of a victim (manifest and weights).")],
    out: Annotated[Path, typer.Option(help="The picture: .png, .pdf or .svg.")] = Path("gallery.png"),
    trust_code: TrustCode = False,
) -> None:
    """Draw ten images of `val`: clean, triggered, their difference, and the victim's answers."""
    from bimask.victims.gallery import gallery  # matplotlib

    if out.suffix not in (".png", ".pdf", ".svg"):
        raise SettingError(f"The picture must be a .png, .pdf or .svg, got {out}.")
    found = open_victim(victim, own_code=trust_code)
    figure = gallery(found, found.eval_sets(found.spec.load_data(), "val"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, out)
    except OSError as error:
        raise SettingError(f"Cannot write {out}: {error.strerror}.") from error
    console.tell(f"picture: {out}")
