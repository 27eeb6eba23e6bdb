"""`python -m study.serve models:/NAME@champion`: MLflow's scoring server behind a guard.

The server is MLflow's own, that of `mlflow models serve`, with its requests and answers. By itself it
answers three kinds of bad requests with 500 before any model sees them (no content type, nesting that
`json` gives up on, numbers of thousands of digits), and it reads bodies of any length. Here these are
4xx and a sentence.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import typer
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from mlflow.pyfunc import PyFuncModel, scoring_server
from rich.markup import escape

from bimask.errors import BimaskError
from bimask.progress import Console
from study.promotion.registry import load_registered
from study.tracking.mlflow_runs import tracking_uri

LARGEST = 64 * 2**20  # bytes of a request

Next = Callable[[Request], Awaitable[Response]]


def guarded(model: PyFuncModel, *, largest: int = LARGEST) -> FastAPI:
    """MLflow's scoring server for `model`; bodies of more than `largest` bytes are refused."""
    app: FastAPI = scoring_server.init(model)

    @app.middleware("http")
    async def guard(request: Request, call_next: Next) -> Response:
        if request.method == "POST":
            length = request.headers.get("content-length", "")
            if not length.isdecimal():
                return _refused(411, "A request must say its Content-Length.")
            if int(length) > largest:
                return _refused(413, f"A request may have {largest} bytes, got {length}.")
            if not request.headers.get("content-type"):
                return _refused(415, "A request must say its Content-Type: application/json.")
        return await call_next(request)

    @app.exception_handler(RecursionError)
    @app.exception_handler(ValueError)
    async def unreadable(_request: Request, error: Exception) -> Response:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        return _refused(400, f"The request cannot be read: {reason}.")

    return app


def _refused(status: int, message: str) -> Response:
    return JSONResponse({"error_code": "BAD_REQUEST", "message": message}, status_code=status)


def main(
    model: Annotated[str, typer.Argument(help="models:/NAME@champion or models:/NAME/VERSION")],
    host: Annotated[str, typer.Option(help="There is no authentication: keep it local.")] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 5001,
    outputs: Annotated[Path, typer.Option(help="Where MLflow's SQLite file is.")] = Path("outputs"),
) -> None:
    """Serve a registered model: POST /invocations with {"inputs": [IMAGE, ...]}."""
    try:
        loaded = load_registered(model, tracking_uri(outputs))
    except BimaskError as error:
        message = f"[bold red]error[/]: {escape(str(error))}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        sys.exit(2)
    uvicorn.run(guarded(loaded), host=host, port=port, log_level="warning")


if __name__ == "__main__":
    typer.run(main)
