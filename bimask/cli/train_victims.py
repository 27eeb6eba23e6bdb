"""`python -m bimask train-victims`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape

from bimask.cli.terminal import Device, console
from bimask.devices import resolve_device
from bimask.victims import VictimSpec, load_suite, obtain_victim
from bimask.victims.progress import VictimBars, described

Suite = Annotated[
    Path, typer.Argument(metavar="SUITE.yaml", help="Many victims, such as victims/digits.yaml.")
]
Out = Annotated[Path, typer.Option(help="Folder that holds victims.")]


def train_victims_command(
    suite: Suite, out: Out = Path("outputs/victims"), device: Device = "auto"
) -> None:
    """Train the victims of a suite, one after another, but for those that OUT has."""
    specs, where = load_suite(suite), resolve_device(device)
    failed = []
    with VictimBars(console) as bars:
        for name, spec in specs.items():
            if not build(name, spec, out, where, bars, made=not spec.place(out).is_dir()):
                failed.append(name)
    if failed:
        console.print(f"{len(failed)} of {len(specs)} victims failed: {escape('; '.join(failed))}")
        raise typer.Exit(1)


def build(
    name: str,
    spec: VictimSpec,
    out: Path,
    device: torch.device,
    bars: VictimBars,
    *,
    made: bool,
) -> bool:
    """Load a victim, or make it, or say why there is none; whether there is one.

    Args:
        made: whether the line on it says that it was made now.
    """
    try:
        victim = obtain_victim(
            spec,
            out,
            device=device,
            on_epoch=partial(bars.epoch, name),
            on_prepare=partial(bars.preparing, name),
        )
    except Exception as error:  # whatever it is, the others are made
        bars.ended(name, failure(name, f"{type(error).__name__}: {error}"))
        return False
    bars.ended(name, f"{escape(name)}: {'made' if made else 'found'}, {described(victim)}")
    return True


def failure(name: str, reason: str) -> str:
    """A line on a victim that was not made."""
    return f"{escape(name)}: [bold red]failed[/], {escape(reason)}"
