"""Shared by the tests of the cluster's files: what each says, what no file may say."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FILES = {
    "aws": ROOT / "cluster.yaml",
    "gcp": ROOT / "cluster/gcp.yaml",
    "local": ROOT / "cluster/local.yaml",
}
SECRETS = [
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    r"PRIVATE KEY",
    r"\b(ghp|gho|github_pat|glpat|hf|sk|xox[bp])[-_][A-Za-z0-9_-]{16,}",
    r"://[^/\s:@]+:[^/\s@]+@",
    r"(?i)(?:password|passwd|secret|token|api_?key|access_?key)\w*['\"]?\s*[:=]\s*(?![~$])(?!true|false|required)\S{4,}",
    r"(?<![\w/.-])[A-Za-z0-9+/]{40,}(?![\w/.-])",
]


def read(name):
    return yaml.safe_load(FILES[name].read_text())


@pytest.fixture(scope="session")
def ray_config():
    """Name -> the file as Ray completes and accepts it."""

    def prepared(name):
        config = prepare_config(read(name))
        validate_config(config)
        return config

    return prepared


@pytest.fixture
def cluster_file():
    return read


@pytest.fixture
def secrets_in():
    """Text -> what in it looks like a secret."""
    return lambda text: [found.group() for pattern in SECRETS for found in re.finditer(pattern, text)]


@pytest.fixture
def sent(tmp_path):
    """Cluster configuration, folder -> what rsync would send of it, as Ray calls it."""

    def names(config, folder):
        command = ["rsync", "-avz"]
        for pattern in config["rsync_exclude"]:
            command += ["--exclude", pattern]
        for pattern in config["rsync_filter"]:
            command += ["--filter", f"dir-merge,- {pattern}"]
        target = tmp_path / "sent"
        subprocess.run([*command, f"{folder}/", f"{target}/"], check=True, capture_output=True)
        return {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}

    return names


@pytest.fixture
def text_of():
    return lambda config: json.dumps(config, default=str)
