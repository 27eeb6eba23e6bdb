"""`python -m bimask train-victims`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bimask.cli.terminal import console
from bimask.commands import Device, TrustCode
from bimask.devices import resolve_device
from bimask.nets import code_of_files, require_trusted
from bimask.victims import load_suite
from bimask.victims.progress import VictimBars, build

Suite = Annotated[
    Path, typer.Argument(metavar="SUITE.yaml", help="Many victims, such as victims/digits.yaml.")
]
Out = Annotated[Path, typer.Option(help="Folder that holds victims.")]


def train_victims_command(
    suite: Suite,
    out: Out = Path("outputs/victims"),
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Train the victims of a suite, one after another, but for those that OUT has."""
    specs, where = load_suite(suite), resolve_device(device)
    failed = []
    with code_of_files(trust_code), VictimBars(console) as bars:
        for spec in specs.values():
            require_trusted(spec.net)
        for name, spec in specs.items():
            if not build(name, spec, out, where, bars, made=not spec.place(out).is_dir()):
                failed.append(name)
    if failed:
        console.tell(f"{len(failed)} of {len(specs)} victims failed: {'; '.join(failed)}")
        raise typer.Exit(1)
