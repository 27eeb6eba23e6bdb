"""Search a defence's settings: Optuna on Ray, recorded in MLflow."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bimask.files.bounded import dump_yaml
from bimask.files.home import ensure_home

ensure_home()  # before Ray is imported, which fails without a home

from study.store.records import load

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["load", "run"]


def run(
    study: Mapping[str, Any] | str | Path,
    *,
    outputs: str | Path = "outputs",
    address: str | None = None,
) -> pd.DataFrame:
    """Run a study, as `python -m study.launch` does, and return its trials.

    Args:
        study: the keys of a study's YAML, or the path of one.
        outputs: folder that everything is left in: victims, the study's own folder, MLflow's store.
        address: of a Ray cluster; None joins the one this machine is part of, or starts Ray here.

    Returns:
        One row a trial, see `load`. In the study's folder `best.yaml` holds the chosen settings, and
        `report.html` is its page.

    Raises:
        BimaskError: before the first trial, for anything that would make the study fail.
    """
    from study.pipeline.naming import named  # Ray and MLflow: not for those who only load
    from study.pipeline.run import run_in
    from study.spec.reading import load_config

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(study) if isinstance(study, str | Path) else Path(temporary) / "study.yaml"
        if not isinstance(study, str | Path):
            plain = {k: str(v) if isinstance(v, Path) else v for k, v in study.items()}
            path.write_text(dump_yaml(plain))
        config = load_config(path)
    with named(config, Path(outputs)) as (config, folder):
        run_in(config, folder, address=address)
    return load(folder.name, outputs)
