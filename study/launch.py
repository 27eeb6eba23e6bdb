"""`python -m study.launch [STUDY.yaml]`: run a study from victims to the chosen configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from bimask.errors import BimaskError

DEFAULT = Path(__file__).parent.parent / "search_spaces" / "ims_digits.yaml"


def main(
    study: Annotated[
        Path, typer.Argument(metavar="[STUDY.yaml]", show_default="search_spaces/ims_digits.yaml")
    ] = DEFAULT,
    trials: Annotated[int | None, typer.Option(help="Trials, instead of the file's.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Actors at once; each runs `trials_per_actor` trials.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join: 'auto', or ADDRESS:PORT.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the study and its folder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed, instead of the file's.")] = None,
    leave_out: Annotated[
        str | None,
        typer.Option(
            metavar="ATTACK|all", help="Also without this attack, or each in turn: what is lost on it?"
        ),
    ] = None,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Print space, victims, cost and first trials; run nothing."),
    ] = False,
    outputs: Annotated[Path, typer.Option(help="Where the study's folder goes.")] = Path("outputs"),
) -> None:
    """Search the defence's settings on Ray, record every trial in MLflow, choose the best."""
    overrides = {"trials": trials, "concurrency": concurrency, "name": name, "seed": seed}
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        complete = _run(study, given, leave_out, dry, outputs, address)
    except BimaskError as error:
        message = f"[bold red]error[/]: {escape(str(error))}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(2)
    sys.exit(0 if complete else 1)


def _run(
    study: Path,
    overrides: dict[str, Any],
    leave_out: str | None,
    dry: bool,
    outputs: Path,
    address: str | None,
) -> bool:
    """What the options ask for; its imports are heavy, and come after --help and usage errors."""
    if dry:
        from study.console import wide_console
        from study.dry_run import dry_run

        dry_run(study, overrides, outputs=outputs, console=wide_console())
        return True
    if leave_out is not None:
        from study.protocol import run_leave_out

        return run_leave_out(study, overrides, leave_out, outputs=outputs, address=address)
    from study.run import run_study

    return run_study(study, overrides, outputs=outputs, address=address)


if __name__ == "__main__":
    typer.run(main)
