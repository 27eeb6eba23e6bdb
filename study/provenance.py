"""Where a result comes from: commit, versions, hardware."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("bimask", "torch", "torchvision", "ray", "optuna", "mlflow", "numpy")


@cache
def commit() -> str:
    """The commit of the sources, with `-dirty` if they differ from it; `unknown` outside of git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip() or "unknown"


@cache
def versions() -> dict[str, str]:
    """Python and the packages that decide results."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
