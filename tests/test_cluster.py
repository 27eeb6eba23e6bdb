"""cluster.yaml: what Ray and AWS would take, and what it must never say. No node, no connection."""

from __future__ import annotations

import re
import subprocess
from copy import deepcopy
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

FILE = Path(__file__).parent.parent / "cluster.yaml"
GPU_FAMILIES = {"g4dn", "g5", "g6", "g6e", "p3", "p4d", "p5"}
SECRETS = [
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    r"PRIVATE KEY",
    r"\b(ghp|gho|github_pat|glpat|hf|sk|xox[bp])[-_][A-Za-z0-9_-]{16,}",
    r"://[^/\s:@]+:[^/\s@]+@",
    r"(?i)(?:password|passwd|secret|token|api_?key|access_?key)\w*['\"]?\s*[:=]\s*(?!~/)\S{4,}",
    r"(?<![\w/.-])[A-Za-z0-9+/]{40,}(?![\w/.-])",
]


def read() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """The file as Ray completes and accepts it."""
    prepared = prepare_config(read())
    validate_config(prepared)
    return prepared


@pytest.fixture(scope="module")
def head(cluster: dict[str, Any]) -> dict[str, Any]:
    return cluster["available_node_types"][cluster["head_node_type"]]


@pytest.fixture(scope="module")
def workers(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    types = cluster["available_node_types"]
    return [types[name] for name in types if name != cluster["head_node_type"]]


def commands(cluster: dict[str, Any]) -> list[str]:
    return [text for key, texts in cluster.items() if key.endswith("_commands") for text in texts]


def ray_start(cluster: dict[str, Any], role: str) -> str:
    (command,) = [text for text in cluster[f"{role}_start_ray_commands"] if "ray start" in text]
    return command


def secrets_in(text: str) -> list[str]:
    return [found.group() for pattern in SECRETS for found in re.finditer(pattern, text)]


def launch_problems(node: dict[str, Any]) -> str:
    """What EC2's own description of RunInstances, which botocore carries, says of a node type."""
    ec2 = botocore.session.get_session().get_service_model("ec2")
    shape = ec2.operation_model("RunInstances").input_shape
    request = {"MinCount": 1, "MaxCount": 1, **node["node_config"]}
    report = ParamValidator().validate(request, shape)
    return report.generate_report()


def test_head_runs_no_trials(head: dict[str, Any]) -> None:
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert head["node_config"]["InstanceType"].split(".")[0] not in GPU_FAMILIES
    assert "InstanceMarketOptions" not in head["node_config"]


def test_workers_are_gpus_on_spot_and_scale_from_zero(
    cluster: dict[str, Any], workers: list[dict[str, Any]]
) -> None:
    assert workers
    for worker in workers:
        assert worker["node_config"]["InstanceType"].split(".")[0] in GPU_FAMILIES
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert worker["resources"].get("GPU", 1) > 0  # left out: Ray asks EC2
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= cluster["max_workers"]


def test_nothing_keeps_costing(cluster: dict[str, Any]) -> None:
    assert cluster["provider"]["cache_stopped_nodes"] is False
    assert 0 < cluster["idle_timeout_minutes"] <= 30
    for node in cluster["available_node_types"].values():
        for disk in node["node_config"]["BlockDeviceMappings"]:
            assert disk["Ebs"]["DeleteOnTermination"]


def test_ec2_knows_every_setting_of_a_node(cluster: dict[str, Any], head: dict[str, Any]) -> None:
    ec2 = botocore.session.get_session().get_service_model("ec2")
    known = ec2.shape_for("InstanceType").enum
    for node in cluster["available_node_types"].values():
        assert launch_problems(node) == ""
        assert node["node_config"]["InstanceType"] in known
    misspelt = deepcopy(head)
    misspelt["node_config"]["BlockDeviceMapping"] = misspelt["node_config"].pop("BlockDeviceMappings")
    assert "BlockDeviceMapping" in launch_problems(misspelt)


def test_all_nodes_have_one_image_and_none_takes_rays_old_default(cluster: dict[str, Any]) -> None:
    images = {n["node_config"].get("ImageId", "") for n in cluster["available_node_types"].values()}
    assert len(images) == 1
    assert images.pop().startswith("ami-")


@pytest.mark.parametrize("role", ["head", "worker"])
def test_ray_starts_with_token_and_many_open_files(cluster: dict[str, Any], role: str) -> None:
    assert re.search(r"\bRAY_AUTH_MODE=token ray start\b", ray_start(cluster, role))
    assert "ulimit -n 65536" in ray_start(cluster, role)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_workers_find_the_head(cluster: dict[str, Any]) -> None:
    start = ray_start(cluster, "head").split()
    assert {"--head", "--port=6379", "--autoscaling-config=~/ray_bootstrap_config.yaml"} <= set(start)
    assert "--address=$RAY_HEAD_IP:6379" in ray_start(cluster, "worker").split()


def test_dashboard_and_mlflow_listen_on_loopback_only(cluster: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in ray_start(cluster, "head").split()
    (mlflow,) = [c for c in cluster["head_start_ray_commands"] if "mlflow server" in c]
    assert "--host 127.0.0.1 " in mlflow
    assert "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" in mlflow
    assert "--workers 1" in mlflow
    hosts = re.findall(r"host[= ](\S+)", "\n".join(commands(cluster)))
    assert hosts
    assert set(hosts) == {"127.0.0.1"}
    assert not [c for c in commands(cluster) if "0.0.0.0" in c or "[::]" in c]


def test_every_node_installs_the_project(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/bimask"] == "."
    for role in ("head", "worker"):  # Ray has put setup_commands in front of both
        setup = cluster[f"{role}_setup_commands"]
        assert any(
            c.startswith("cd ~/bimask && ") and "pip install" in c and "-e ." in c for c in setup
        )
    assert any("[aws]" in c for c in cluster["head_setup_commands"])


def test_commands_are_valid_shell(cluster: dict[str, Any]) -> None:
    for command in commands(cluster):
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, f"{command}\n{checked.stderr}"


@pytest.mark.parametrize("name", [".env", ".env.local", "outputs", ".git", ".venv", "cluster.pem"])
def test_private_and_large_things_stay_here(cluster: dict[str, Any], name: str) -> None:
    assert any(fnmatch(name, pattern) for pattern in cluster["rsync_exclude"])
    assert cluster["rsync_filter"] == [".gitignore"]


@pytest.mark.parametrize("name", ["bimask", "study", "search_spaces", "pyproject.toml", "README.md"])
def test_what_the_nodes_install_is_sent(cluster: dict[str, Any], name: str) -> None:
    assert not any(fnmatch(name, pattern) for pattern in cluster["rsync_exclude"])


def test_file_holds_no_secret() -> None:
    assert secrets_in(FILE.read_text()) == []


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
def test_secret_would_be_found(planted: str) -> None:
    assert secrets_in(f"{FILE.read_text()}\n# {planted}\n")


@pytest.mark.parametrize(
    ("place", "right", "wrong"),
    [
        ((), "idle_timeout_minutes", "idle_timeout_minuts"),
        (("auth",), "ssh_user", "ssh_usr"),
        (("available_node_types", "ray.worker.default"), "min_workers", "min_worker"),
    ],
)
def test_ray_refuses_a_misspelt_key(place: tuple[str, ...], right: str, wrong: str) -> None:
    config = read()
    section = config
    for key in place:
        section = section[key]
    section[wrong] = section.pop(right)
    with pytest.raises(jsonschema.ValidationError, match=f"'{wrong}' was unexpected"):
        validate_config(prepare_config(config))
