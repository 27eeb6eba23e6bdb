"""`python -m study.serve models:/NAME@champion`: a promoted model over HTTP.

What it answers and refuses is in `study.promotion.server`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from bimask.commands import TrustCode, refusals
from bimask.progress import Console
from study.promotion.listening import bound, server_of
from study.promotion.registry import load_registered
from study.promotion.server import ModelServer
from study.tracking.mlflow_runs import tracking_uri

EVERYWHERE = ("0.0.0.0", "::")


def main(
    model: Annotated[str, typer.Argument(help="models:/NAME@champion or models:/NAME/VERSION")],
    host: Annotated[str, typer.Option(help="There is no authentication: keep it local.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 5001,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name by which clients reach it; may be repeated.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images of a request, at most; bounds its bytes as well.")
    ] = None,
    outputs: Annotated[Path, typer.Option(help="Where MLflow's SQLite file is.")] = Path("outputs"),
    trust_code: TrustCode = False,
) -> None:
    """Serve a registered model: POST /invocations with {"inputs": [IMAGE, ...]}."""
    # Pillow warns of a picture that claims to be very large and reads on; here it is refused.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    hosts = [name for name in (host, *(allow_host or ())) if name not in EVERYWHERE]
    with refusals():
        predictor = load_registered(model, tracking_uri(outputs), own_code=trust_code)
        app = ModelServer(predictor, hosts, batch)
        listening = bound(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    limits = f"at most {app.limits.images} images and {app.limits.size} bytes a request"
    Console(stderr=True).tell(f"{model} answers on {address}, {limits}")
    try:
        server_of(app).run(sockets=[listening])
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    typer.run(main)
