"""How much `study.serve` answers, and how soon, for 1, 8 and 20 clients.

    python -m benchmarks.serving [--seconds 5]

The server of `study.promotion.server` runs in a process of its own, on loopback, with nets of random
weights; clients are threads of this process, each with one connection. Adds a run to
benchmarks/results/serving/ and writes benchmarks/serving.md.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from socket import socket
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from benchmarks import report
from benchmarks.pages.serving import KEPT
from benchmarks.purify import cpu_name
from bimask.cleaned.classifier import Classifier
from bimask.nets import build_net
from bimask.progress import Console
from study.promotion.listening import bound, server_of
from study.promotion.server import ModelServer
from study.store.provenance import commit

NETS = {"small_resnet": (1, 16, 16), "preactresnet18": (3, 32, 32)}  # of width 16; shapes of images
CLIENTS = (1, 8, 20)
WARM = 3  # requests of a client before its clock starts
WRONG = json.dumps({"inputs": [[["text"]]]}).encode()


def serve(name: str, listening: socket) -> None:
    """The server's process; what it logs goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    shape = NETS[name]
    torch.manual_seed(0)
    channels, height, width = shape
    statistics = {"mean": [0.5] * channels, "std": [0.25] * channels}
    net = build_net(
        name, in_channels=channels, num_classes=10, width=16, image_size=(height, width), **statistics
    )
    app = ModelServer(Classifier(net, [str(i) for i in range(10)], shape))
    server_of(app).run(sockets=[listening])


@contextmanager
def served(name: str) -> Iterator[int]:
    """A server in a process of its own; its port."""
    listening = bound("127.0.0.1", 0)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(name, listening))
    process.start()
    try:
        yield listening.getsockname()[1]  # connections wait in the socket until the server is up
    finally:
        process.terminate()
        process.join()
        listening.close()


def bodies(shape: tuple[int, int, int]) -> dict[str, tuple[bytes, int, int]]:
    """Requests by name: body, images in it, status of its answer."""
    channels, height, width = shape
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
    png = base64.b64encode(buffer.getvalue()).decode()

    def body(*images: Any) -> bytes:
        return json.dumps({"inputs": images}).encode()

    return {
        "one PNG": (body(png), 1, 200),
        "one array": (body(pixels.tolist()), 1, 200),
        "32 PNGs": (body(*[png] * 32), 32, 200),
        "refused": (WRONG, 0, 400),
    }


def client(port: int, body: bytes, status: int, begin: threading.Barrier, until: float) -> list[float]:
    """Ask until the time is over: seconds of each answer, negative where its status was another."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask() -> float:
        began = time.perf_counter()
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        seconds = time.perf_counter() - began
        return seconds if answer.status == status else -seconds

    for _ in range(WARM):
        ask()
    begin.wait()
    end = time.perf_counter() + until
    answers = []
    while time.perf_counter() < end:
        answers.append(ask())
    connection.close()
    return answers


def measured(port: int, clients: int, body: bytes, status: int, seconds: float) -> dict[str, float]:
    """Requests a second, and milliseconds of the median and of the 99th percentile."""
    begin = threading.Barrier(clients)
    with ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(client, port, body, status, begin, seconds) for _ in range(clients)]
        answers = np.array([seconds for one in asked for seconds in one.result()])
    p50, p99 = np.percentile(np.abs(answers) * 1000, [50, 99])
    return {
        "clients": clients,
        "count": len(answers),
        "failed": int((answers < 0).sum()),
        "requests": len(answers) / seconds,
        "p50": float(p50),
        "p99": float(p99),
    }


def main(
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each row of the table.")] = 5.0,
) -> None:
    """Measure the server; one run is added to the results."""
    before, rows, console = os.getloadavg()[0], [], Console()
    for name, shape in NETS.items():
        with served(name) as port:
            for request, (body, images, status) in bodies(shape).items():
                for clients in CLIENTS:
                    found = measured(port, clients, body, status, seconds)
                    rows.append({"net": name, "request": request, "images": images} | found)
                    console.print(rows[-1])
    run = {
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load": [before, os.getloadavg()[0]],
        "date": date.today().isoformat(),
        "commit": commit(),
        "rows": rows,
    }
    runs = json.loads(KEPT.read_text()) if KEPT.is_file() else []
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps([*runs, run], indent=1) + "\n")
    report.write()


if __name__ == "__main__":
    typer.run(main)
