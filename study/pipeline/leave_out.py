"""`--leave-out`: a study of all attacks, one without each, and what not having seen an attack costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from study.analysis import leave_out
from study.pipeline.choosing import accepted
from study.pipeline.naming import named
from study.pipeline.opening import say
from study.pipeline.run import run_in
from study.report.console import show_leave_out, wide_console
from study.spec.keys import Confirm
from study.spec.reading import load_config
from study.store.files import write_text

LEAVE_OUT = "leave_one_out.json"


def run_leave_out(
    path: Path, overrides: Mapping[str, object], which: str, *, outputs: Path, **where: Any
) -> bool:
    """Run the study, and what it takes to leave out one attack, or all in turn.

    Where the study's own trials are those that it would have without the attack, its records suffice
    (`study.analysis.leave_out`). Else the study is run again without each, NAME-without-ATTACK, and
    both choices are confirmed on the attack's victims.

    Args:
        which: an attack's name, or "all".
        where: `address`, `storage` and `wait` of `study.pipeline.run.run_in`.

    Returns:
        Whether every study had a COMPLETE trial.
    """
    config = accepted(load_config(path, overrides), partial(say, wide_console()))
    attacks = leave_out.select(config, which)
    if config.confirmation is None and not leave_out.is_exact(config):
        config = config.model_copy(update={"confirm": Confirm(paper_seeds=0)})
    with named(config, outputs, chosen_by_user="name" in overrides) as (config, folder):
        full = run_in(config, folder, **where)
    complete = bool(full["n_complete"])
    if leave_out.is_exact(config):
        found = full["leave_one_out"]
        found["attacks"] = {name: found["attacks"][name] for name in attacks}
    else:
        others = {}
        for attack in attacks:
            with named(leave_out.without(config, attack), outputs) as other:
                others[attack] = run_in(*other, **where)
        complete = complete and all(summary["n_complete"] for summary in others.values())
        found = leave_out.table_of_studies(config, full, others)
    write_text(folder / LEAVE_OUT, json.dumps(found, indent=2) + "\n")
    show_leave_out(wide_console(), found, config.task)
    return complete
