"""`python -m study.purify`: `python -m bimask purify`, with a configuration from MLflow's registry.

All options are those of `bimask purify`. `--config` may also be `models:/NAME@champion` or
`models:/NAME/VERSION`, which bimask cannot resolve, since it knows nothing of MLflow.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from bimask.__main__ import app
from bimask.commands import refusals
from study.store.records import OUTPUTS
from study.tracking.mlflow_runs import tracking_uri


def resolved(words: list[str], folder: Path) -> list[str]:
    """The command's words with every `models:/...` replaced by the file it stands for."""
    return [_fetched(word, folder) if word.startswith("models:/") else word for word in words]


def _fetched(reference: str, folder: Path) -> str:
    from study.promotion.registry import fetch_config

    return str(fetch_config(reference, tracking_uri(OUTPUTS), folder))


if __name__ == "__main__":
    with refusals(), tempfile.TemporaryDirectory(prefix="bimask-config-") as temporary:
        app(["purify", *resolved(sys.argv[1:], Path(temporary))])
