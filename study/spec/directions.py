"""Which way each objective is better."""

from __future__ import annotations

from typing import Literal

Direction = Literal["maximize", "minimize"]

DIRECTIONS: dict[str, Direction] = {
    "clean_accuracy": "maximize",
    "attack_success": "minimize",
    "recovery": "maximize",
    "pruned_share": "minimize",
    "seconds": "minimize",
    "accuracy_drop": "minimize",
    "risk": "minimize",
}
OBJECTIVES = {name: DIRECTIONS[name] for name in ("clean_accuracy", "attack_success")}  # the default
