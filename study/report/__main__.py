"""`python -m study.report NAME`: one HTML page about a study, beside its records and in MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bimask.commands import TrustCode, refusals
from bimask.progress import Console


def main(
    name: Annotated[str, typer.Argument(help="Name of a study: its folder in --outputs.")],
    outputs: Annotated[Path, typer.Option(help="Where studies are.")] = Path("outputs"),
    out: Annotated[
        Path | None, typer.Option(help="The file, instead of OUTPUTS/NAME/report.html.")
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Write a page about a study that opens in any browser, without a network."""
    from bimask.nets import code_of_files
    from study.report import log_report, write_report  # heavy: after --help and usage errors

    console = Console()

    with refusals(), code_of_files(trust_code):
        path = write_report(outputs / name, outputs / "victims", out, say=console.tell)
        for line in (f"report  {path}", log_report(path, outputs / name, outputs)):
            console.tell(line)


if __name__ == "__main__":
    typer.run(main)
