"""`python -m study.protocol PROTOCOL.yaml`: every attack on every net, with the study's choices."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bimask.progress import outlive_readers
from study.options import Cluster, Outputs, Storage, Wait
from study.search.interrupts import GO_ON, ends_of_a_command


def main(
    protocol: Annotated[Path | None, typer.Argument(metavar="[PROTOCOL.yaml]")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the protocol and its folder.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Of search for every defence, instead of the file's.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Trials at once.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="Go on with a protocol that was cut short.")
    ] = None,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the cases, GPU hours and dollars; train nothing."),
    ] = False,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="With --dry-run: sustained TFLOP/s of the device, instead of what is measured here.",
        ),
    ] = None,
    dollars: Annotated[
        float | None, typer.Option(min=0, help="With --dry-run: price of one device for an hour.")
    ] = None,
    address: Cluster = None,
    outputs: Outputs = None,
    storage: Storage = None,
    trust_code: Annotated[
        bool,
        typer.Option("--trust-code", help="Run the code of own nets that --resume or --dry-run meets."),
    ] = False,
    wait: Wait = 0,
) -> None:
    """Run a protocol: tune each defence on some attacks, judge it on every case."""
    outlive_readers()
    given = {"name": name, "search_seconds": seconds, "concurrency": concurrency}
    overrides: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    if dry and resume is not None:
        raise typer.BadParameter("--dry-run looks at a file; leave --resume out.")
    if not dry and (tflops is not None or dollars is not None):
        raise typer.BadParameter("--tflops and --dollars are of --dry-run.")
    # heavy: after --help and usage errors
    from bimask.nets import code_of_files

    with ends_of_a_command(GO_ON), code_of_files(trust_code or (protocol is not None and not dry)):
        if dry:
            from study.pipeline.protocol.cost import tell_cost

            tell_cost(protocol, overrides, outputs or Path("outputs"), tflops=tflops, dollars=dollars)
            return
        from study.pipeline.protocol.run import run_protocol

        complete = run_protocol(
            protocol,
            overrides,
            outputs=outputs or Path("outputs"),
            resume=resume,
            address=address,
            storage=storage,
            wait=wait,
        )
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    typer.run(main)
