"""Options that several commands of a study have, with one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Outputs = Annotated[
    Path | None, typer.Option(envvar="BIMASK_OUTPUTS", help="Where folders go, `outputs` here.")
]
Storage = Annotated[
    str | None,
    typer.Option(
        envvar="BIMASK_STORAGE",
        help="Folder or URI (s3://, gs://) that all nodes reach, for trials' checkpoints and shared "
        "victims.",
    ),
]
Wait = Annotated[
    float,
    typer.Option(
        envvar="BIMASK_WAIT", min=0, help="Minutes for an autoscaler to start the first worker."
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to join; without it: this machine."),
]
