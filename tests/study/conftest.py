from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shipped_studies():
    return sorted((ROOT / "search_spaces").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def _no_servers_from_outside(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
