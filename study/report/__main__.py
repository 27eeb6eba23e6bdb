"""`python -m study.report NAME`: one HTML page about a study, beside its records and in MLflow."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bimask.cli.terminal import TrustCode
from bimask.errors import BimaskError
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

    def say(sentence: str) -> None:
        console.print(escape(sentence), soft_wrap=True, highlight=False)

    try:
        with code_of_files(trust_code):
            path = write_report(outputs / name, outputs / "victims", out, say=say)
        for line in (f"report  {path}", log_report(path, outputs / name, outputs)):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    except BimaskError as error:
        message = f"[bold red]error[/]: {escape(str(error))}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    typer.run(main)
