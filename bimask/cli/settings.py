"""`python -m bimask settings`: what a defence can be told, as a table."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from bimask.cli.terminal import console
from bimask.defences import DEFENCES, defence_named


def settings_command(
    defence: Annotated[str, typer.Argument(help=f"One of {', '.join(DEFENCES)}.")] = "ims",
) -> None:
    """List every setting of a defence: its published value, the range a study searches, its meaning."""
    config = defence_named(defence).config
    searched = config.searched()
    table = Table("setting", "published", "searched", "meaning", title=defence, title_justify="left")
    for name, info in config.model_fields.items():
        found = searched.get(name)
        shown = f"{found[0].low:g} to {found[0].high:g}" if found else ""
        shown += ", log" if found and found[0].log else ""
        table.add_row(name, f"{info.default}", shown, info.description or "")
    console.print(table)
    if config.PROFILES:
        console.print(f"profiles: {', '.join(config.PROFILES)} (`profile: NAME` in a YAML)")
