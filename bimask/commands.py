"""What the commands of both packages share: options of one meaning, and how a refusal ends them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from bimask.errors import BimaskError
from bimask.progress import Console

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Run the code of an own net.")]


@contextmanager
def refusals() -> Iterator[None]:
    """What is refused within is told on standard error, and ends the command with the code 2; so does
    what the environment refuses, such as a full disk."""
    try:
        yield
    except (BimaskError, OSError) as error:
        Console(stderr=True).tell_error(error)
        sys.exit(2)
