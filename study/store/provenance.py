"""Where a result comes from: commit, versions, hardware."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("bimask", "torch", "torchvision", "ray", "optuna", "mlflow", "numpy")


@cache
def commit() -> str:
    """The commit of the sources, with `-dirty` if they differ from it.

    Outside of git BIMASK_COMMIT, which a study sent to a cluster has from its sender, else `unknown`.
    """
    unknown = os.environ.get("BIMASK_COMMIT", "unknown")
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
        return unknown
    return described.stdout.strip() or unknown


@cache
def versions() -> dict[str, str]:
    """Python and the packages that decide results."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


@cache
def sources() -> str:
    """Sixteen hex digits of the Python files of both packages that this process runs."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for path in sorted(path for name in ("bimask", "study") for path in (root / name).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
