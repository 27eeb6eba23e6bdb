"""Which way each objective is better: the metrics of every task, and what all tasks share."""

from __future__ import annotations

from bimask.tasks import CLASSIFICATION, TASKS, Direction

__all__ = ["DIRECTIONS", "OBJECTIVES", "SCORES", "Direction"]

# A record has those of its own task.
SCORES = tuple(dict.fromkeys(name for task in TASKS.values() for name in task.metrics))
DIRECTIONS: dict[str, Direction] = {
    **{name: one.direction for task in TASKS.values() for name, one in task.metrics.items()},
    "pruned_share": "minimize",
    "seconds": "minimize",
    "accuracy_drop": "minimize",
    "risk": "minimize",
}
OBJECTIVES = {name: DIRECTIONS[name] for name in CLASSIFICATION.objectives}  # the default
