"""What the three `ray up` files have in common: tokens, loopback, valid shell, nothing secret."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CANARY = "canary5c0ffee5c0ffee"
SHIPPED = [ROOT / "cluster.yaml", *sorted((ROOT / "cluster").iterdir())]
EACH = pytest.mark.parametrize("name", ["aws", "gcp", "local"])


def commands(config):
    return [text for key, texts in config.items() if key.endswith("_commands") for text in texts]


def ray_start(config, role):
    (command,) = [text for text in config[f"{role}_start_ray_commands"] if "ray start" in text]
    return command


@EACH
@pytest.mark.parametrize("role", ["head", "worker"])
def test_ray_starts_with_token_and_many_open_files(ray_config, name, role):
    config = ray_config(name)
    assert re.search(r"\bRAY_AUTH_MODE=token ray start\b", ray_start(config, role))
    assert "ulimit -n 65536" in ray_start(config, role)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@EACH
def test_workers_find_the_head(ray_config, name):
    config = ray_config(name)
    start = ray_start(config, "head").split()
    assert {"--head", "--port=6379", "--autoscaling-config=~/ray_bootstrap_config.yaml"} <= set(start)
    assert "--address=$RAY_HEAD_IP:6379" in ray_start(config, "worker").split()


@EACH
def test_the_dashboard_listens_on_loopback_only(ray_config, name):
    config = ray_config(name)
    assert "--dashboard-host=127.0.0.1" in ray_start(config, "head").split()
    hosts = re.findall(r"host[= ](\S+)", "\n".join(commands(config)))
    assert set(hosts) == {"127.0.0.1"}
    assert not [c for c in commands(config) if "0.0.0.0" in c or "[::]" in c]


@EACH
def test_every_node_installs_the_project_and_the_head_starts_mlflow(ray_config, name):
    config = ray_config(name)
    assert config["file_mounts"]["~/bimask"] == "."
    for role in ("head", "worker"):  # Ray has put setup_commands in front of both
        assert any("cluster/node.sh" in command for command in config[f"{role}_setup_commands"])
    assert any("cluster/mlflow.sh start" in command for command in config["head_setup_commands"])
    assert any("BIMASK_STORAGE" in command for command in config["head_setup_commands"])


@EACH
def test_commands_are_valid_shell(ray_config, name):
    for command in commands(ray_config(name)):
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, f"{command}\n{checked.stderr}"


@pytest.mark.parametrize("script", sorted((ROOT / "cluster").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_shell_and_stop_at_errors(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    assert "set -euo pipefail" in script.read_text()


def test_mlflow_is_on_loopback_with_password_hosts_one_worker_and_no_jobs():
    (serve,) = re.findall(
        r"exec mlflow server((?:.|\n)*?)\n}", (ROOT / "cluster/mlflow.sh").read_text()
    )
    for option in ("--host 127.0.0.1", "--workers 1", "--app-name basic-auth", "--allowed-hosts"):
        assert option in serve
    script = (ROOT / "cluster/mlflow.sh").read_text()
    assert "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" in script
    assert "umask 077" in script


@pytest.mark.skipif(shutil.which("rsync") is None, reason="no rsync here")
@EACH
def test_private_and_large_things_stay_here(ray_config, sent, tmp_path, name):
    folder = tmp_path / "project"
    for file in (".env", ".env.local", "outputs/a/b", ".git/config", ".venv/x", "my.pem", "my.key"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(CANARY)
    for file in ("data/cifar10/x.png", "study/launch.py", "pyproject.toml", "search_spaces/mine.yaml"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("fine")
    shutil.copy(ROOT / ".gitignore", folder)
    expected = {".gitignore", "study/launch.py", "pyproject.toml", "search_spaces/mine.yaml"}
    assert sent(ray_config(name), folder) == expected


@EACH
def test_what_the_environment_holds_is_not_in_what_ray_takes(ray_config, text_of, monkeypatch, name):
    for variable in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(variable, CANARY)
    assert CANARY not in text_of(ray_config(name))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_no_file_holds_a_secret(secrets_in, path):
    text = path.read_text()
    if path.name == "mlflow.sh":  # where a password is made and handed on, by name
        text = re.sub(
            r"(?m)^.*(?:MLFLOW_TRACKING_PASSWORD=|MLFLOW_FLASK_SERVER_SECRET_KEY=).*$", "", text
        )
    assert secrets_in(text) == []


@pytest.mark.parametrize(
    "planted",
    [
        "AKIA" + "A1B2" * 4,
        "-----BEGIN RSA " + "PRIVATE KEY-----",
        "aws_secret_access_key: " + "x" * 8,
        "MLFLOW_TRACKING_PASSWORD=" + "hunter22",
        "RAY_AUTH_TOKEN=" + "0123abcd",
        "https://user:" + "word@example.org",
        "/".join(["a1B2c3D4e5"] * 4),
    ],
)
def test_secret_would_be_found(secrets_in, planted):
    assert secrets_in(f"# {planted}\n")


@pytest.mark.parametrize(
    ("place", "right", "wrong"),
    [
        ((), "idle_timeout_minutes", "idle_timeout_minuts"),
        (("auth",), "ssh_user", "ssh_usr"),
        (("available_node_types", "ray.worker.default"), "min_workers", "min_worker"),
    ],
)
def test_ray_refuses_a_misspelt_key(cluster_file, place, right, wrong):
    config = cluster_file("aws")
    section = config
    for key in place:
        section = section[key]
    section[wrong] = section.pop(right)
    with pytest.raises(jsonschema.ValidationError, match=f"'{wrong}' was unexpected"):
        validate_config(prepare_config(config))


def test_pins_are_what_is_installed_and_tested_here():
    from importlib.metadata import version

    lines = (ROOT / "cluster/constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {"ray", "torch", "torchvision", "optuna", "mlflow"} <= set(pins)
    assert pins["ray"] == version("ray")  # cluster files are written for this one
    for manifest in ("kuberay.yaml", "kuberay-job.yaml"):
        assert f"rayVersion: {pins['ray']}" in (ROOT / "cluster" / manifest).read_text()
    assert f"rayproject/ray:{pins['ray']}-" in (ROOT / "cluster/Dockerfile").read_text()


def test_local_keeps_every_worker_it_names(ray_config):
    config = ray_config("local")
    (kind,) = config["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == 2
