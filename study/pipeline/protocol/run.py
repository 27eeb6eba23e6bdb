"""The run of a protocol: all victims first, then its comparisons, one after another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bimask.nets import require_trusted
from bimask.progress import Console
from study.analysis import protocol as analysis
from study.analysis.protocol import Protocolled
from study.pipeline.comparison import compare_in
from study.pipeline.making import make_all
from study.pipeline.naming import named
from study.pipeline.prepare import require_writable
from study.report import protocol as report
from study.report.console import wide_console
from study.search.interrupts import InterruptedStudyError, Interrupts, LostRayError
from study.spec.comparison import ComparisonConfig
from study.spec.config import StudyError
from study.spec.protocol import Case, ProtocolConfig, load_protocol
from study.store import comparison as comparisons
from study.store import protocol as store
from study.store.files import locked, write_text


def run_protocol(
    path: Path | None,
    overrides: Mapping[str, object],
    *,
    outputs: Path,
    resume: str | None = None,
    **where: Any,
) -> bool:
    """Run the protocol in a YAML file, or go on with one.

    Args:
        where: `address`, `storage` and `wait` of `study.pipeline.run.run_in`.

    Returns:
        Whether every case was judged with every defence.

    Raises:
        BimaskError: before the first victim, for anything that would make the protocol fail.
        InterruptedStudyError: a signal ended it, in good order.
        LostRayError: Ray died under it.
    """
    require_writable(outputs)
    with ExitStack() as stack:
        if resume is not None:
            config, folder = store.reopen(outputs, resume, path, overrides)
            stack.enter_context(locked(folder))
        elif path is not None:
            config, folder = stack.enter_context(
                named(load_protocol(path, overrides), outputs, chosen_by_user="name" in overrides)
            )
        else:
            raise StudyError("There is no protocol to run; give a YAML file, or --resume NAME.")
        interrupts = Interrupts()

        def reason() -> InterruptedStudyError | LostRayError:
            return interrupts.reason(config.name, begun=folder.exists())

        with interrupts.in_good_order(reason):
            for spec in config.suite().values():  # Ray's workers would not ask
                require_trusted(spec.net)
            if resume is None:
                store.begin(folder, config)
            console = wide_console()
            there = {**where, "part_of": config.name}
            _make_victims(config, outputs, there)
            whole = True
            for one in config.comparisons().values():
                console.rule(one.name)
                whole &= _compared(one, outputs, there)
                _write(config, folder, console)
            return whole


def _make_victims(config: ProtocolConfig, outputs: Path, where: Mapping[str, Any]) -> None:
    """All victims that are not there yet, as many at once as there is room for.

    Raises:
        StudyError: some could not be made; the others are kept.
    """
    cases = config.case_of()
    specs = {
        _told(cases.get(digest), spec.seed, spec.name): spec for digest, spec in config.suite().items()
    }
    any_one = next(iter(config.comparisons().values()))
    make_all(specs, any_one, outputs / "victims", remedy="`except` leaves cases out", **where)


def _told(case: Case | None, seed: int, otherwise: str) -> str:
    """A victim's name for people."""
    if case is None:
        return f"{otherwise}, to tune on, seed {seed}"
    rate = "" if case.rate is None else f" {100 * case.rate:g} %"
    return f"{case.dataset} {case.net} {case.attack}{rate}, seed {seed}"


def _compared(config: ComparisonConfig, outputs: Path, where: Mapping[str, Any]) -> bool:
    """Run a comparison of the protocol, go on with it, or find it ended."""
    folder = outputs / config.name
    begun = (folder / comparisons.COMPARISON).is_file()
    with locked(folder):
        if begun:
            config, folder = comparisons.reopen(
                outputs, config.name, None, {"concurrency": config.concurrency}
            )
        return compare_in(config, folder, begun=begun, **where)


def _write(config: ProtocolConfig, folder: Path, console: Console) -> None:
    """The tables of all that is judged so far."""
    found: Protocolled = analysis.protocolled(
        config,
        {
            key: comparisons.read_judged(folder.parent / one.name)
            for key, one in config.comparisons().items()
            if (folder.parent / one.name).is_dir()
        },
    )
    write_text(folder / store.TABLES, json.dumps(found, indent=2) + "\n")
    write_text(folder / store.CSV, analysis.table(found).to_csv(index=False))
    write_text(folder / store.PAGE, report.render(found))
    for sentence in report.verdict(found):
        console.tell(sentence)
    console.tell(f"page: {folder / store.PAGE}")
