"""What the server of a promoted model answers a second, and how soon."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.markdown import NOTHING, listed, page, table
from benchmarks.records import RESULTS, read

KEPT = RESULTS / "serving" / "runs.json"
COLUMNS = ("net", "request", "clients", "requests a second", "images a second", "p50, ms", "p99, ms")


def serving() -> str:
    """The page: a row a net, a request and a number of clients, of the newest run."""
    runs: list[dict[str, Any]] = read(KEPT) or []
    if not runs:
        return page("What the server answers", NOTHING)
    run = runs[-1]
    rows = run["rows"]
    about = (
        f"Measured on {run['device']}, whose {run['cores']} cores clients and server share, torch "
        f"{run['torch']}, load {run['load'][0]:.1f} before and {run['load'][1]:.1f} after, "
        f"{run['date']}, commit {run['commit']}."
    )
    most = max(row["clients"] for row in rows)
    failed = sum(row["failed"] for row in rows)
    single = [row for row in rows if row["images"] == 1 and row["clients"] == most]
    kept = listed([f"{row['p99']:.0f} ms ({row['net']}, {row['request']})" for row in single])
    return page(
        "What the server answers",
        "Clients on the same machine keep a connection each and ask without a pause; nets have random "
        "weights (`python -m benchmarks.serving`). A refused request has text in place of a number. "
        + about,
        table(
            COLUMNS,
            [
                [
                    *(row["net"], row["request"], str(row["clients"]), f"{row['requests']:.0f}"),
                    f"{row['requests'] * row['images']:.0f}" if row["images"] else "",
                    *(f"{row['p50']:.1f}", f"{row['p99']:.1f}"),
                ]
                for row in rows
            ],
        ),
        f"With {most} clients a request of one image is answered in {kept} at the 99th percentile, and "
        f"{failed} of {sum(row['count'] for row in rows)} requests got another status than expected.",
    )
