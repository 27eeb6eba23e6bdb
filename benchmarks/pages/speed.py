"""How long a purification takes and what it holds: the plain program against this one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.cases import GOALS
from benchmarks.pages.markdown import between, listed, made, page, table
from benchmarks.records import RESULTS, read

Value = dict[str, Any]
Lines = Iterable[str]  # a table, and one sentence of conclusion
ABOUT = """`naive` is the published schedule written plainly, `exact` is `purify` with the published
settings, and `fast` is its profile. A number is the median of the repeats with the least and the
most in brackets, and only ratios within a table mean anything."""
TUNED = """Each schedule has a search of equal size on `val`, with the same sampler, images and
objective (`python -m benchmarks.tune`); a row is the best point of a search. A point that holds the
goal with a margin is 0 outside it, and a search leaves a point after a first seed that is hopeless."""


def speed() -> str:
    """The page: one part a file `results/DEVICE.json`, then the search for the settings."""
    parts = [
        ABOUT,
        goals(),
    ]
    for path in sorted(RESULTS.glob("*.json")):
        for case, values in read(path).items():
            parts.append(f"## {case}, {path.stem}")
            for part, value in values.items():
                parts += section(part, value)
    tuned = [(name, read(RESULTS / "tune" / f"{name}.json")) for name in ("naive", "fast")]
    if all(found for _, found in tuned):
        parts += ["## tune", *tune(dict(tuned))]
    return page("Speed and quality", *parts)


def goals() -> str:
    """What a run must hold on `test`."""
    rows = [
        [case, f"{g.attack_success:g}", f"{100 * g.accuracy_drop:g} points", f"{g.recovery:g}"]
        for case, g in GOALS.items()
    ]
    return "\n\n".join(
        [
            "A run holds the goal if it is inside these bounds on `test` from some round to its end; "
            "seconds are counted to that round, without the evaluation.",
            table(["case", "ASR at most", "accuracy lost at most", "RA at least"], rows),
        ]
    )


def section(part: str, value: Value) -> Lines:
    """The heading, the machine, the table and its conclusion."""
    yield f"### {part}"
    yield made(value["about"])
    yield from WRITERS[part.partition(",")[0]]({k: v for k, v in value.items() if k != "about"})


def _spread(value: dict[str, float], unit: float = 1, digits: int = 2) -> str:
    median, low, high = (unit * value[key] for key in ("median", "min", "max"))
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def rounds(value: Value) -> Lines:
    names = ["naive", "exact", "fast"]
    columns = ["stage", *(f"{name}, ms a round" for name in names), "naive / exact", "naive / fast"]
    rows = [
        [
            stage,
            *(_spread(v[name], 1e3, 1) for name in names),
            *(_spread(v[f"naive / {name}"], 1, 1) for name in names[1:]),
        ]
        for stage, v in value.items()
    ]
    yield table(columns, rows)
    exact, fast = ([v[f"naive / {name}"]["median"] for v in value.values()] for name in names[1:])
    yield (
        f"A round of `exact` is {between(exact, 1)} times and a round of `fast` {between(fast, 1)} "
        "times as fast as a round of `naive`, by the stage."
    )


def exactness(value: Value) -> Lines:
    yield table(
        ["compared", "largest difference of a mask"], ([k, f"{v:.1e}"] for k, v in value.items())
    )
    further = "naive" if _naive_is_further(value) else "exact"
    yield (
        f"In float64 `exact` and `naive` agree to {value['exact and naive, float64']:.1e} of a mask; "
        f"of the masks in float32 those of `{further}` are further from `naive` in float64."
    )


def _naive_is_further(value: Value) -> bool:
    naive: float = value["naive in float32 and naive in float64"]
    exact: float = value["exact in float32 and naive in float64"]
    return naive > exact


def memory(value: Value) -> Lines:
    rows = [[k, f"{v['bytes'] / 1e6:.1f}", f"{v['ratio']:.2f}"] for k, v in value.items()]
    yield table(["program", "peak MB", "of one forward and backward"], rows)
    shown = [f"`{name}` {value[name]['ratio']:.2f}" for name in ("naive", "exact", "fast")]
    yield f"In units of one forward and backward pass of a batch, the programs hold {listed(shown)}."


def population(value: Value) -> Lines:
    columns = [
        "program",
        "8 alone, s",
        "8 together, s",
        "alone / together",
        "launches alone / together",
    ]
    rows = [
        [
            kind,
            _spread(v["alone"]),
            _spread(v["together"]),
            _spread(v["alone / together"]),
            f"{v['launches alone / together']:.1f}" if "launches a member" in v else "-",
        ]
        for kind, v in value.items()
    ]
    yield table(columns, rows)
    shown = [f"{v['alone / together']['median']:.2f} times (`{kind}`)" for kind, v in value.items()]
    yield f"Eight members together are {listed(shown)} as fast as eight members one after another."


def growth(value: Value) -> Lines:
    rows = []
    for what, points in value.items():
        sizes = sorted(points, key=int)
        cells = ", ".join(f"{at}: {1e3 * points[at]:.1f}" for at in sizes)
        rows.append(
            [
                what,
                cells,
                f"{int(sizes[-1]) / int(sizes[0]):g}",
                f"{points[sizes[-1]] / points[sizes[0]]:.1f}",
            ]
        )
    yield table(["of", "ms (a round; for rounds: of that many)", "grows by", "time grows by"], rows)
    members = value["members, a member"]
    cheapest = min(members, key=lambda at: (members[at], int(at)))
    yield f"A round of a member is cheapest with {cheapest} members at once."


def quality(value: Value) -> Lines:
    yield _quality_table("program", value)
    held = [
        f"`{name}` holds the goal with {v['held']} of {len(v['runs'])} seeds"
        for name, v in value.items()
    ]
    more = ""
    if {"naive", "fast"} <= value.keys() and value["fast"]["seconds"] is not None:
        naive = value["naive"]
        # a run that never holds the goal would have needed longer than it had
        least = [run["seconds"] or run["total_seconds"] for run in naive["runs"]]
        ratio = statistics.mean(least) / value["fast"]["seconds"]
        at_least = "" if naive["seconds"] is not None else "at least "
        more = f"; `naive` takes {at_least}{ratio:.1f} times the seconds of `fast` to the goal"
    yield f"{listed(held)}{more}."


def _quality_table(first: str, runs: Value) -> str:
    columns = [first, "seeds that hold the goal", "s to the goal (mean of those)", "s of the whole run"]
    columns += ["ACC", "ASR", "RA"]

    def row(name: str, v: Value) -> list[str]:
        where = v["seconds_where_held"]
        scores = (v[key] for key in ("clean_accuracy", "attack_success", "recovery"))
        return [
            name,
            f"{v['held']} of {len(v['runs'])}",
            "-" if where is None else f"{where:.1f}",
            f"{v['total_seconds']:.1f}",
            *(f"{s['mean']:.3f} ± {s['std']:.3f}" for s in scores),
        ]

    return table(columns, (row(name, v) for name, v in runs.items()))


def levers(value: Value) -> Lines:
    yield _quality_table("lever", value)
    never = [f"*{name}*" for name, v in value.items() if not v["held"]]
    yield f"The goal is held by no seed under {listed(never) or 'none of the levers'}."


def tune(found: dict[str, Any]) -> Lines:
    """The best point of each search on `val`."""
    columns = ["case", "schedule", "trials", "forward passes", "seeds", "outside the goal"]
    columns += ["ACC", "ASR", "RA", "s"]
    shown = ("miss", "clean_accuracy", "attack_success", "recovery")
    rows, ratios, closer = [], [], 0
    cases = sorted(set.intersection(*(set(kept) for kept in found.values())))
    for case in cases:
        best = {schedule: found[schedule][case]["best"]["ranked"][0] for schedule in found}
        outside = {}
        for schedule, point in best.items():
            means = {
                key: statistics.mean(run[key] for run in point["runs"]) for key in (*shown, "seconds")
            }
            outside[schedule] = means["miss"]
            counts = (
                found[schedule][case]["best"]["trials"],
                point["forward_passes"],
                len(point["runs"]),
            )
            cells = [
                *map(str, counts),
                *(f"{means[key]:.3f}" for key in shown),
                f"{means['seconds']:.1f}",
            ]
            rows.append([case, schedule, *cells])
        ratios.append(best["naive"]["forward_passes"] / best["fast"]["forward_passes"])
        closer += outside["fast"] < outside["naive"]
    yield TUNED
    yield table(columns, rows)
    yield (
        f"In {closer} of {len(cases)} cases the best point of `fast` is closer to the goal than the "
        f"best point of `naive`, which takes {between(ratios, 1)} times the forward passes."
    )


def profile(value: Value) -> Lines:
    kinds = [kind for kind in next(iter(value.values())) if kind != "seconds"]
    rows = [
        [name, f"{v['seconds']:.2f}", *(f"{100 * v[kind] / v['seconds']:.0f}" for kind in kinds)]
        for name, v in value.items()
    ]
    yield table(["program", "s", *(f"{kind}, %" for kind in kinds)], rows)
    most = {name: max(kinds, key=lambda kind, v=v: v[kind]) for name, v in value.items()}  # type: ignore[misc]
    limited = [
        f"{kind} ({listed([f'`{name}`' for name in most if most[name] == kind])})"
        for kind in dict.fromkeys(most.values())
    ]
    yield f"Most of the time is {listed(limited)}."


def whole(value: Value) -> Lines:
    names = {
        "naive": "the plain program, published schedule",
        "robust": "`robust`, from suspect to masks",
        "search": "of that, the search of triggers",
        "purification": "of that, the masks",
        "naive_round": "a round of the plain program, last stage",
        "exact": "a round of `exact`",
        "bfloat16": "a round of `exact` in bfloat16",
    }
    rows = [[shown, _spread(value["seconds"][name])] for name, shown in names.items()]
    yield table(["what", "s"], rows)
    ratios = [f"{name}: {_spread(v, 1, 1)}" for name, v in value["ratios"].items()]
    yield f"The ratios are, by pairs of one repeat, {listed(ratios)}."


WRITERS: dict[str, Callable[[Value], Lines]] = {
    "rounds": rounds,
    "exactness": exactness,
    "memory": memory,
    "population": population,
    "growth": growth,
    "quality": quality,
    "levers": levers,
    "profile": profile,
    "whole": whole,
}
