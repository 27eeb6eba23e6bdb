"""Results on disk, and the tables of benchmarks/README.md written from them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"


def keep(path: Path, case: str, part: str, value: dict[str, Any]) -> None:
    """Put one part's result into the file, in place of the one it had."""
    results = json.loads(path.read_text()) if path.is_file() else {}
    results.setdefault(case, {})[part] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def write() -> None:
    """Write every result file's tables into the README, between its marks."""
    text = README.read_text()
    for path in sorted(RESULTS.glob("*.json")):
        tables = "\n".join(_tables(json.loads(path.read_text())))
        begin, end = f"<!-- {path.stem} -->", f"<!-- end of {path.stem} -->"
        before, found, rest = text.partition(begin)
        after = rest.partition(end)[2] if found else "\n"
        text = f"{before.rstrip()}\n\n{begin}\n{tables}\n{end}{after}"
    README.write_text(text)


def _tables(results: dict[str, Any]) -> Iterable[str]:
    for case, parts in results.items():
        yield f"\n## {case}\n"
        for part, value in parts.items():
            about = value["about"]
            yield (
                f"**{part}** ({about['device']}, {about['threads']} thread(s), torch {about['torch']}, "
                f"{about['date']})\n"
            )
            yield from WRITERS[part.partition(",")[0]]({k: v for k, v in value.items() if k != "about"})
            yield ""


def table(columns: list[str], rows: Iterable[list[str]]) -> Iterable[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _spread(value: dict[str, float], unit: float = 1, digits: int = 2) -> str:
    median, low, high = (unit * value[key] for key in ("median", "min", "max"))
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _rounds(value: dict[str, Any]) -> Iterable[str]:
    names = ["naive", "exact", "fast"]
    columns = ["stage", *(f"{name}, ms a round" for name in names), "naive / exact", "naive / fast"]
    yield from table(
        columns,
        (
            [
                stage,
                *(_spread(v[name], 1e3, 1) for name in names),
                *(_spread(v[f"naive / {name}"], 1, 1) for name in names[1:]),
            ]
            for stage, v in value.items()
        ),
    )


def _plain(value: dict[str, Any]) -> Iterable[str]:
    yield from table(
        ["compared", "largest difference of a mask"], ([k, f"{v:.1e}"] for k, v in value.items())
    )


def _memory(value: dict[str, Any]) -> Iterable[str]:
    yield from table(
        ["program", "peak MB", "of one forward and backward"],
        ([k, f"{v['bytes'] / 1e6:.1f}", f"{v['ratio']:.2f}"] for k, v in value.items()),
    )


def _population(value: dict[str, Any]) -> Iterable[str]:
    yield from table(
        ["program", "8 alone, s", "8 together, s", "alone / together", "launches alone / together"],
        (
            [
                kind,
                _spread(v["alone"]),
                _spread(v["together"]),
                _spread(v["alone / together"]),
                f"{v['launches alone / together']:.1f}" if "launches a member" in v else "-",
            ]
            for kind, v in value.items()
        ),
    )


def _growth(value: dict[str, Any]) -> Iterable[str]:
    rows = []
    for what, points in value.items():
        cells = ", ".join(f"{at}: {1e3 * seconds:.1f}" for at, seconds in points.items())
        rows.append([what, cells])
    yield from table(["of", "ms (a round; for rounds: of that many)"], rows)


def _quality(value: dict[str, Any]) -> Iterable[str]:
    yield from _quality_rows("program", value)
    if {"naive", "fast"} <= value.keys() and value["fast"]["seconds"] is not None:
        naive = value["naive"]
        # a run that never holds the goal would have needed longer than it had
        least = [run["seconds"] or run["total_seconds"] for run in naive["runs"]]
        ratio = statistics.mean(least) / value["fast"]["seconds"]
        words = (
            "" if naive["seconds"] is not None else "at least, its failed runs counted as they are, "
        )
        yield f"\nnaive / fast, seconds to the goal, mean of the seeds: {words}{ratio:.1f}"


def _quality_rows(first: str, runs: dict[str, Any]) -> Iterable[str]:
    columns = [first, "seeds that hold the goal", "s to the goal (mean of those)", "s of the whole run"]
    columns += ["ACC", "ASR", "RA"]

    def row(name: str, v: dict[str, Any]) -> list[str]:
        where = v["seconds_where_held"]
        scores = (v[key] for key in ("clean_accuracy", "attack_success", "recovery"))
        return [
            name,
            f"{v['held']} of {len(v['runs'])}",
            "-" if where is None else f"{where:.1f}",
            f"{v['total_seconds']:.1f}",
            *(f"{s['mean']:.3f} ± {s['std']:.3f}" for s in scores),
        ]

    yield from table(columns, (row(name, v) for name, v in runs.items()))


def _levers(value: dict[str, Any]) -> Iterable[str]:
    yield from _quality_rows("lever", value)


WRITERS: dict[str, Callable[[dict[str, Any]], Iterable[str]]] = {
    "rounds": _rounds,
    "exactness": _plain,
    "memory": _memory,
    "population": _population,
    "growth": _growth,
    "quality": _quality,
    "levers": _levers,
}
