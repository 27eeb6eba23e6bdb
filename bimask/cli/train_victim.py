"""`python -m bimask train-victim`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from bimask.cli.terminal import console, score_table
from bimask.commands import Device, TrustCode
from bimask.devices import resolve_device
from bimask.errors import SettingError, describe
from bimask.files.bounded import read_yaml
from bimask.nets import code_of_files
from bimask.victims import VictimSpec, obtain_victim
from bimask.victims.progress import VictimBars


def train_victim_command(
    spec: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="Keys of a victim.")],
    out: Annotated[Path, typer.Option(help="Folder that holds victims.")] = Path("outputs/victims"),
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Train a backdoored model, or find it in OUT if it is there."""
    try:
        parsed = VictimSpec.model_validate(read_yaml(spec))
    except ValidationError as error:
        raise SettingError(f"{spec}: {describe(error)}") from error
    except (OSError, ValueError) as error:
        raise SettingError(f"Cannot read the victim {spec}: {error}.") from error
    with code_of_files(trust_code), VictimBars(console) as bars:
        victim = obtain_victim(
            parsed,
            out,
            device=resolve_device(device),
            on_epoch=partial(bars.epoch, parsed.name),
            on_prepare=partial(bars.preparing, parsed.name),
        )
    score_table({"victim": victim.scores["test"]})
    console.tell(f"victim: {out / parsed.digest}")
