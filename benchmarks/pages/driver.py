"""What one driver carries: trials that do nothing."""

from __future__ import annotations

from typing import Any

from benchmarks.pages.markdown import NOTHING, between, page, table
from benchmarks.records import RESULTS, read

KEPT = RESULTS / "scale" / "runs.json"
WALL, MEMORY, GROWTH = 0.3, 100.0, 3.0  # bars: s a trial, KB a trial, a suggestion's growth
FROM = "500"  # trial from which that is counted, in a run that is long enough


def driver() -> str:
    """The page: a column a run."""
    runs: list[dict[str, Any]] = read(KEPT) or []
    if not runs:
        return page("What one driver carries", NOTHING)

    def cells(name: str, values: list[str], bar: str = "") -> list[str]:
        return [name, *values, bar]

    rows = [
        cells("trials that ended COMPLETE", [f"{r['complete']} of {r['trials']}" for r in runs]),
        cells("sampler, trials an actor", [f"{r['sampler']}, {r['trials_per_actor']}" for r in runs]),
        cells("nodes of one CPU, cores", [f"{r['nodes']}, {r['cores']}" for r in runs]),
        cells("load before, after", ["{:.1f}, {:.1f}".format(*r["load"]) for r in runs]),
        cells("wall time a trial, s", [f"{r['seconds_a_trial']:.2f}" for r in runs], f"{WALL:g}"),
        cells("CPU of the driver a trial, s", [f"{r['driver_cpu_a_trial']:.2f}" for r in runs]),
        cells(
            "the driver grows a trial, KB",
            [f"{r['driver_kb_a_trial']:.0f}" for r in runs],
            f"{MEMORY:g}",
        ),
        cells("CPU of a suggestion, s (at trial)", [_suggestions(r["suggestion_cpu"]) for r in runs]),
        cells("a suggestion grows by", [_growth(r["suggestion_cpu"]) for r in runs], f"{GROWTH:g}"),
        cells("runs that MLflow takes a second", [f"{r['mlflow']['runs_a_second']:.0f}" for r in runs]),
        cells("commit", [r["commit"] for r in runs]),
    ]
    within = sum(run["seconds_a_trial"] <= WALL for run in runs)
    cpu = between([run["driver_cpu_a_trial"] for run in runs])
    return page(
        "What one driver carries",
        "Trials that do nothing go through all of `study.search` (`python -m benchmarks.scale`). "
        "[One head](../docs/scaling.md) says what follows from it.",
        table(["what", *(f"run {i}" for i in range(1, len(runs) + 1)), "bar"], rows),
        f"The driver takes {cpu} s of CPU a trial, and {within} of {len(runs)} runs stay below the bar "
        "of wall time.",
    )


def _suggestions(seconds: dict[str, float | None]) -> str:
    return ", ".join(f"{value:.3f} ({at})" for at, value in _known(seconds))


def _growth(seconds: dict[str, float | None]) -> str:
    """The last over that at trial `FROM`, or over the first; a run of less than 100 trials has none."""
    if not (known := _known(seconds)):
        return ""
    at, first = next(((at, value) for at, value in known if at == FROM), known[0])
    return f"{known[-1][1] / first:.1f} from {at}"


def _known(seconds: dict[str, float | None]) -> list[tuple[str, float]]:
    return [(at, value) for at, value in seconds.items() if value is not None]
