"""cluster/local.yaml for real: `ray up` over sshd to three hosts, a study by the tunnel, `ray down`.

The hosts are namespaces on this machine (`hosts.py`), without a way out. What is not tried here is
cluster/node.sh's pip: the hosts share this environment (BIMASK_VENV).
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("hosts", Path(__file__).with_name("hosts.py"))
hosts = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hosts)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(hosts.missing()), reason=f"needs {', '.join(hosts.missing())}"),
]

CANARY = "canary" + "5c0ffee" * 3
STUDY = {
    "name": "mine",
    "trials": 6,
    "paper_defaults": False,  # it takes longer than all the others
    "clean_images_per_class": 3,
    "report_every": 2,
    "victims": [
        {"dataset": "digits", "image_size": 12, "net": "small_resnet", "width": 4, "epochs": 6}
        | {"attack": {"name": "badnets"}}
    ],
    "reference_point": {"clean_accuracy": 0.3, "attack_success": 1.0},
    "choose": {"max_accuracy_drop": 0.5},
    "fixed": {"inner_optimizer": "sign", "step_size": None, "patience": None}
    | dict.fromkeys(("initialise_rounds", "minimise_rounds", "select_rounds"), 2),
    "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True}},
}
GRPC = """
import grpc, sys
for port, method in (
    (6379, "NodeInfoGcsService/GetAllNodeInfo"), (6379, "InternalKVGcsService/InternalKVGet"),
    (8077, "NodeManagerService/GetNodeStats"), (8078, "ReporterService/GetTraceback"),
    (10001, "RayletDriver/ClusterInfo"), (8076, "ObjectManagerService/Pull"),
    (8076, "ObjectManagerService/Push"),
):
    ask = grpc.insecure_channel(f"{sys.argv[1]}:{port}").unary_unary(f"/ray.rpc.{method}")
    try:
        ask(b"", timeout=20, metadata=[("authorization", f"Bearer {w}") for w in sys.argv[2:]])
        print(port, method, "ANSWERED")
    except grpc.RpcError as error:
        print(port, method, error.code().name)
"""


def in_shell(cluster, host, script, *, timeout=600):
    """A command as a user types it in a host, with this environment's programs."""
    path = f"export PATH={Path(sys.prefix) / 'bin'}:$PATH RAY_USAGE_STATS_ENABLED=0\n"
    return cluster.do(host, path + script, timeout=timeout)


def filled_in(addresses):
    """cluster/local.yaml for these hosts: one CPU for each of the workers."""
    text = (ROOT / "cluster/local.yaml").read_text()
    venv = f"BIMASK_VENV={sys.prefix} bash ~/bimask/cluster/node.sh"
    for old, new in (
        ("HEAD-FILL-IN", addresses["head"]),
        ("WORKER-1-FILL-IN", addresses["one"]),
        ("WORKER-2-FILL-IN", addresses["two"]),
        ("ssh_user: bimask", "ssh_user: root"),
        ("/mnt/FILL-IN/bimask", "/mnt/shared"),
        ("bash ~/bimask/cluster/node.sh", venv),
        ("ray start --head", "ray start --head --num-cpus=0"),
        ("ray start --address", "ray start --num-cpus=1 --address"),
    ):
        assert old in text
        text = text.replace(old, new)
    return text


def listening(cluster, host):
    """(address, port) of what a host listens on; addresses as `ss` writes them."""
    rows = [line.split()[3] for line in in_shell(cluster, host, "ss -ltnH").stdout.splitlines()]
    return {(address.rpartition(":")[0], int(address.rpartition(":")[2])) for address in rows}


def what_stays(cluster, host):
    """What a host listens on for good: a worker ends by itself, a minute after the head has gone."""
    deadline = time.monotonic() + 240
    while len(sockets := listening(cluster, host)) > 1 and time.monotonic() < deadline:
        time.sleep(2)
    return sockets


@pytest.fixture(scope="module")
def went(tmp_path_factory):
    """The whole way, once; what was seen on it."""
    folder = tmp_path_factory.mktemp("hosts")
    seen = SimpleNamespace()
    names = ["you", "head", "one", "two"]
    with hosts.Hosts(names, folder, ROOT) as cluster:
        (folder / "shared/local.yaml").write_text(filled_in(cluster.addresses))
        (folder / "shared/mine.yaml").write_text(yaml.safe_dump(STUDY))
        (folder / "shared/grpc_probe.py").write_text(GRPC)
        made = in_shell(
            cluster,
            "you",
            "rsync -a --exclude .git --exclude outputs --exclude '.*_cache' /mnt/project/ ~/project/\n"
            "cd ~/project && cp /mnt/shared/local.yaml cluster/ && cp /mnt/shared/mine.yaml .\n"
            f"echo MLFLOW_TRACKING_PASSWORD={CANARY} > .env\n"
            "ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token",
        )
        assert made.returncode == 0, made.stderr
        up = "RAY_UP_enable_autoscaler_v2=0 ray up -y --no-config-cache cluster/local.yaml"
        seen.up = in_shell(cluster, "you", f"cd ~/project && {up}", timeout=1200)
        assert seen.up.returncode == 0, seen.up.stdout + seen.up.stderr
        seen.status = wait_for_nodes(cluster, 3)
        seen.listening = {host: listening(cluster, host) for host in names[1:]}
        seen.addresses = cluster.addresses
        head = cluster.addresses["head"]
        probe = f"python /mnt/shared/grpc_probe.py {head}"
        curl = 'curl -s -o /dev/null -w "$port / %{http_code}\\n"'
        seen.strangers = in_shell(
            cluster,
            "you",
            f"export HOME=/tmp/stranger; mkdir $HOME; {probe}; {probe} wrong\n"
            f"for port in 8079 8080; do {curl} {head}:$port/; done",
        ).stdout.splitlines()
        # The third shell, through the tunnel; it is left open in the background.
        seen.launch = in_shell(
            cluster,
            "you",
            "cd ~/project\n"
            "nohup ray dashboard cluster/local.yaml --no-config-cache > /tmp/tunnel 2>&1 &\n"
            "for i in $(seq 120); do curl -s -o /dev/null localhost:8265 && break; sleep 1; done\n"
            "curl -s -o /dev/null -w '%{http_code}' localhost:8265/api/jobs/ > /tmp/no-token\n"
            "RAY_ADDRESS=http://localhost:8265 "
            "python -m study.launch mine.yaml --concurrency 2",
            timeout=2400,
        )
        seen.no_token = in_shell(cluster, "you", "cat /tmp/no-token").stdout
        mlflow = "curl -s -o /dev/null -w '%{http_code} '"
        seen.mlflow = in_shell(
            cluster,
            "head",
            ". ~/.bimask/mlflow.env; U=$MLFLOW_TRACKING_URI\n"
            "A=api/2.0/mlflow/experiments/get?experiment_id=0\n"
            f"{mlflow} $U/$A; {mlflow} -u admin:wrong $U/$A; {mlflow} -H 'Host: evil.example' $U/$A\n"
            f"{mlflow} -u admin:$MLFLOW_TRACKING_PASSWORD $U/$A",
        ).stdout.split()
        seen.summary = in_shell(cluster, "head", "cat ~/outputs/mine/summary.json").stdout
        seen.leaks = in_shell(
            cluster,
            "head",
            ". ~/.bimask/mlflow.env\n"
            f'for secret in {CANARY} "$MLFLOW_TRACKING_PASSWORD" "$(cat ~/.ray/auth_token)"; do\n'
            'grep -rlF -- "$secret" ~/outputs ~/bimask /tmp/ray /mnt/shared; done',
        ).stdout
        down = "cd ~/project && RAY_UP_enable_autoscaler_v2=0 "
        down += "ray exec cluster/local.yaml 'bash ~/bimask/cluster/mlflow.sh stop' && "
        seen.down = in_shell(cluster, "you", f"{down} ray down -y cluster/local.yaml", timeout=600)
        seen.left = {host: what_stays(cluster, host) for host in names[1:]}
        ps = "ps ax -o args | grep -E '[r]aylet|[g]cs_server|[m]lflow|[r]ay::' || true"
        seen.processes = {host: in_shell(cluster, host, ps).stdout for host in names[1:]}
    seen.namespaces = hosts.run("ip", "netns")
    return seen


def wait_for_nodes(cluster, count):
    deadline = time.monotonic() + 600
    while True:
        status = in_shell(cluster, "head", "RAY_AUTH_MODE=token timeout 100 ray status").stdout
        if f"{count} local.cluster.node" in status:
            return status
        assert time.monotonic() < deadline, status
        time.sleep(5)


def test_head_and_two_workers_join(went):
    assert "3 local.cluster.node" in went.status
    assert "0.0/2.0 CPU" in went.status


def test_the_study_runs_there_and_its_output_is_shown_here(went):
    assert went.launch.returncode == 0, went.launch.stdout + went.launch.stderr
    assert "3 node(s) checked" in went.launch.stdout
    assert "Pareto front of mine" in went.launch.stdout
    summary = json.loads(went.summary)
    assert (summary["n_complete"], summary["n_failed"]) == (6, 0)


def test_nothing_listens_but_what_the_docs_name(went):
    text = (ROOT / "docs" / "cluster.md").read_text()
    named_there = text[text.index("\nPorts on other addresses") :].split("Dashboard")[0]
    named = {int(port) for port in re.findall(r"\b\d{2,5}\b", named_there)}
    assert {22, 6379, 8076} <= named
    for host, sockets in went.listening.items():
        for address, port in sockets:
            if "127.0.0.1" not in address:
                assert port in named or 10002 <= port <= 10999, (host, address, port)
    loopback = {port for address, port in went.listening["head"] if address == "127.0.0.1"}
    assert {5000, 8265} <= loopback
    assert not {5000, 8265} & {p for a, p in went.listening["head"] if "127.0.0.1" not in a}


def test_who_has_no_token_is_refused_at_every_port(went):
    answers = dict(line.rsplit(" ", 1) for line in went.strangers)
    assert len(answers) == 9
    assert set(answers.values()) == {"UNAUTHENTICATED", "401"}, answers
    assert went.no_token == "401"


def test_who_has_no_password_or_another_host_name_is_refused_by_mlflow(went):
    assert went.mlflow == ["401", "401", "403", "200"]


def test_no_secret_is_in_anything_shipped_or_written(went):
    assert went.leaks == ""


def test_nothing_is_left(went):
    assert went.down.returncode == 0, went.down.stdout + went.down.stderr
    for host, sockets in went.left.items():
        assert {port for _, port in sockets} == {22}, host
        assert went.processes[host] == "", host
    assert hosts.SPACE not in went.namespaces
