"""`python -m bimask import` and `export-backdoorbench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bimask.cli.terminal import console, score_table
from bimask.commands import Device
from bimask.devices import resolve_device
from bimask.errors import SettingError
from bimask.interop import find_checkpoint, read_checkpoint, save_imported
from bimask.interop.export import export_victim


def import_command(
    source: Annotated[Path, typer.Argument(help="A file of another framework, or its folder.")],
    out: Annotated[Path, typer.Argument(help="New folder for the victim.")],
    clean_data: Annotated[
        str | None, typer.Option(help="Folder of the clean data, or imagefolder:PATH.")
    ] = None,
    net: Annotated[str | None, typer.Option(help="Which net it is, if the files do not say.")] = None,
    allow_null_trigger: Annotated[bool, typer.Option("--allow-null-trigger")] = False,
    allow_not_learned: Annotated[bool, typer.Option("--allow-not-learned")] = False,
    device: Device = "auto",
) -> None:
    """Read a victim of another framework, score it anew, and write it without pickles."""
    if out.exists():
        raise SettingError(f"{out} exists; give a new folder.")
    where = resolve_device(device)
    victim = read_checkpoint(source, clean_data=clean_data, net=net, device=where)
    rows = {"victim": victim.scores}
    if victim.before is not None:
        rows = {"victim": victim.before, "defended": victim.scores}
    score_table(rows)
    changed, visibly = victim.changed_pixel_rate, victim.changed_visibly
    if changed is None or visibly is None:
        console.print("changed pixels: unknown, the clean counterparts are not stored")
    else:
        shares = f"{100 * changed:.2f} % ({100 * visibly:.2f} % by more than one grey level)"
        console.print(f"changed pixels: {shares}")
    for note in victim.notes:
        console.tell(f"note: {note}")
    victim.refuse_if_useless(allow_null_trigger=allow_null_trigger, allow_not_learned=allow_not_learned)
    save_imported(victim, out, source=find_checkpoint(source)[1])
    console.tell(f"imported victim: {out}")


def export_backdoorbench_command(
    victim: Annotated[Path, typer.Argument(help="Folder of a victim, trained here or imported.")],
    out: Annotated[Path, typer.Argument(help="New folder, such as record/NAME.")],
    dataset: Annotated[str | None, typer.Option(help="BackdoorBench's name of the data set.")] = None,
) -> None:
    """Write a victim as BackdoorBench's attack_result.pt, with its triggered test images."""
    scores, notes = export_victim(victim, out, dataset=dataset)
    score_table({"victim": scores})
    for note in notes:
        console.tell(f"note: {note}")
    console.tell(f"written: {out / 'attack_result.pt'}")
