"""Where measured records lie, and how a part of a file is replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def keep(path: Path, case: str, part: str, value: dict[str, Any]) -> None:
    """Put one part's result into the file, in place of the one it had."""
    results = json.loads(path.read_text()) if path.is_file() else {}
    results.setdefault(case, {})[part] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def read(path: Path) -> Any:
    """The records of a file; None where nothing was measured."""
    return json.loads(path.read_text()) if path.is_file() else None
