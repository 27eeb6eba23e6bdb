"""`python -m bimask settings`: what a defence can be told, as a table."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from bimask.cli.terminal import console
from bimask.defences import defence_named
from bimask.errors import SettingError
from bimask.tasks import TASKS


def settings_command(
    defence: Annotated[str, typer.Argument(help="Its name; none is the task's usual one.")] = "",
    task: Annotated[str, typer.Option(help=f"What it defends: {', '.join(TASKS)}.")] = "classification",
) -> None:
    """List every setting of a defence: its default, the range a study searches, its meaning."""
    if task not in TASKS:
        raise SettingError(f"There is no task {task!r}; known are {', '.join(TASKS)}.")
    name = defence or TASKS[task].defence
    config = defence_named(name, TASKS[task].defences).config
    default = "published" if task == "classification" else "default"
    searched = config.searched()
    table = Table("setting", default, "searched", "meaning", title=name, title_justify="left")
    for key, info in config.model_fields.items():
        found = searched.get(key)
        shown = f"{found[0].low:g} to {found[0].high:g}" if found else ""
        shown += ", log" if found and found[0].log else ""
        table.add_row(key, f"{info.default}", shown, info.description or "")
    console.print(table)
    if config.PROFILES:
        console.print(f"profiles: {', '.join(config.PROFILES)} (`profile: NAME` in a YAML)")
