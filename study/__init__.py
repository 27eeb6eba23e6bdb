"""Search the defence's settings: Optuna on Ray, recorded in MLflow."""

from study.store.records import load

__all__ = ["load"]
