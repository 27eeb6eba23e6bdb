"""A Ray of a study's own: who reaches it, who may tell it anything; and whose Ray is joined."""

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from study.search import cluster
from study.search.embedded import exposure
from study.spec.config import StudyError

ROOT = Path(__file__).parents[4]
STRANGER = 65534
# A machine with an address beside loopback, which Ray finds by the way to the network.
MACHINE = """
ip link set lo up
ip addr add 10.99.0.1/24 dev lo
ip route add default via 10.99.0.2 dev lo
exec "$@"
"""


@pytest.fixture(scope="session")
def apart():
    """Words before a command that run it on a network of its own, which ends with it."""
    words = ["unshare", "--net", "--map-root-user", "sh", "-c", MACHINE, "sh"]
    if shutil.which("unshare") is None or shutil.which("ss") is None:
        pytest.skip("needs unshare and ss")
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("no network namespace may be made here")
    return words


def on_loopback(line):
    """Whether a line of `ss` names a socket that only this machine reaches."""
    return re.search(r"\s(127\.0\.0\.1|\[::1\]|\[::ffff:127\.0\.0\.1\]):\d+\s", line) is not None


def environment(home, **more):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    return kept | {"PYTHONPATH": str(ROOT), "HOME": str(home), "RAY_AUTH_MODE": "disabled"} | more


# --- who reaches it ---

SEEN = """
import json, os, subprocess, urllib.error, urllib.request
import grpc, ray
from study.search import cluster

ASKED = ("ray.rpc.JobInfoGcsService/GetAllJobInfo", "ray.rpc.NodeManagerService/GetNodeStats",
         "ray.rpc.InternalKVGcsService/InternalKVKeys", "ray.rpc.CoreWorkerService/PushTask",
         "ray.rpc.ObjectManagerService/Pull", "ray.rpc.JobManagerService/SubmitJob",
         "ray.rpc.ReporterService/GetTraceback")

def answer(port, method):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary("/" + method)(b"", timeout=2)
            return "OK"
        except grpc.RpcError as error:
            return error.code().name

def read(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as page:
            return page.status
    except urllib.error.HTTPError as error:
        return error.code
    except Exception as error:
        return type(error).__name__

before = dict(os.environ)
cluster.start_ray("local")
actor = ray.remote(type("Actor", (), {"mode": lambda self: os.environ["RAY_AUTH_MODE"]})).remote()
seen = {"mode": ray.get(actor.mode.remote()), "token": os.environ["RAY_AUTH_TOKEN"]}
seen["listening"] = subprocess.run(["ss", "-Hlntu"], capture_output=True, text=True).stdout.splitlines()
ports = [line.split()[4].rpartition(":")[2] for line in seen["listening"]]
seen["told"] = {port: [answer(port, method) for method in ASKED] for port in ports}
seen["jobs"] = {port: read(port, "/api/job_agent/jobs/") for port in ports}
seen["session"] = os.path.realpath(ray._private.worker._global_node.get_session_dir_path())
cluster.stop_ray()
seen["restored"] = {k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH")} == {
    k: v for k, v in before.items() if k.startswith("RAY_AUTH")}
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen(apart, tmp_path_factory):
    """What a stranger sees of an embedded Ray whose user has tokens switched off for other clusters."""
    home = tmp_path_factory.mktemp("home")
    words = [*apart, sys.executable, "-c", SEEN]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(home), timeout=180)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"home": home}


@pytest.mark.ray
def test_all_that_a_study_of_this_machine_starts_listens_on_loopback(seen):
    assert len(seen["listening"]) > 8, "raylet, its agents, a worker, the driver"
    assert [line for line in seen["listening"] if not on_loopback(line)] == []


@pytest.mark.ray
def test_without_the_token_no_port_does_anything(seen):
    assert seen["mode"] == "token"
    for port, codes in seen["told"].items():
        assert "OK" not in codes
        assert "UNAUTHENTICATED" in codes or seen["jobs"][port] == 401, "each by what it is there for"


@pytest.mark.ray
def test_the_token_is_in_no_file_and_the_environment_is_given_back(seen):
    assert seen["restored"]
    files = [path for top in (seen["home"], seen["session"]) for path in Path(top).rglob("*")]
    assert not [
        path for path in files if path.is_file() and seen["token"].encode() in path.read_bytes()
    ]


@pytest.mark.slow
@pytest.mark.ray
def test_a_whole_study_opens_no_port_to_others(apart, tmp_path):
    """`study.launch`, asked every half second what listens on its network."""
    study = {
        "name": "tiny",
        "trials": 2,
        "clean_images_per_class": 3,
        "victims": [
            {"dataset": "digits", "image_size": 12, "net": "small_resnet", "width": 4, "epochs": 1}
            | {"min_clean_accuracy": 0.0, "min_attack_success": 0.0, "attack": {"name": "badnets"}}
        ],
        "reference_point": {"clean_accuracy": 0.0, "attack_success": 1.0},
        "fixed": {"initialise_rounds": 1, "minimise_rounds": 1, "select_rounds": 1, "inner_steps": 1},
        "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True}},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(study))
    watch = 'python=$1; shift; "$python" -m study.launch "$@" & '
    watch += "while kill -0 $!; do ss -Hlntu >> listening; sleep 0.5; done 2> /dev/null; wait $!"
    words = [*apart, "sh", "-c", watch, "sh", sys.executable, str(tmp_path / "tiny.yaml")]
    done = subprocess.run(
        [*words, "--address", "local"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        env=environment(tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    listening = (tmp_path / "listening").read_text().splitlines()
    assert len(listening) > 20
    assert {line for line in listening if not on_loopback(line)} == set()


# --- the user's own token ---


def test_a_token_that_ray_wrote_for_everyone_to_read_is_its_users_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    exposure.protect_token_file()
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir(mode=0o755)
    token.write_text("0" * 64)
    token.chmod(0o644)
    exposure.protect_token_file()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700


# --- whose Ray is joined ---

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@pytest.fixture
def left(tmp_path, monkeypatch):
    """What `ray start` left, as if an owner and a listener of this machine had left it."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray").chmod(0o777)

    def leave(address, owner=None):
        path = tmp_path / "ray" / "ray_current_cluster"
        path.write_text(address)
        if owner is not None:
            os.chown(path, owner, owner)
        return path

    return leave


@pytest.fixture
def strangers_port():
    """A port of loopback at which another user listens."""
    code = (
        f"import os, socket, sys; os.setuid({STRANGER}); s = socket.create_server(('127.0.0.1', 0))\n"
    )
    code += "print(s.getsockname()[1], flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdin=-1, stdout=-1, text=True) as process:
        yield int(process.stdout.readline())
        process.stdin.close()


def test_what_the_user_left_is_known_by_its_address(left):
    assert exposure.left_here() is None
    left("10.0.0.5:6379")
    assert exposure.left_here() == exposure.LeftRay("10.0.0.5:6379", None)


@needs_root
def test_a_ray_that_another_user_left_is_not_the_users(left):
    left("10.0.0.5:6379", STRANGER)
    assert exposure.left_here() == exposure.LeftRay("10.0.0.5:6379", "nobody")


@needs_root
def test_nor_is_one_at_a_port_that_another_user_has_taken_since(left, strangers_port):
    left(f"127.0.0.1:{strangers_port}")
    assert exposure.left_here().owner == "nobody"
    with socket.create_server(("127.0.0.1", 0)) as own:
        left(f"127.0.0.1:{own.getsockname()[1]}")
        assert exposure.left_here().owner is None


@pytest.mark.parametrize("text", ["", "10.0.0.5", "\x1b]0;taken\x07:6379", "a\nb:6379", "x" * 500])
def test_what_is_no_address_is_none_of_rays(left, text):
    left(text)
    assert exposure.left_here() is None


def test_a_link_or_a_pipe_is_no_file_of_rays(left, tmp_path):
    path = left("10.0.0.5:6379")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert exposure.left_here() is None
    path.unlink()
    os.mkfifo(path)
    started = time.monotonic()
    assert exposure.left_here() is None
    assert time.monotonic() - started < 60


@needs_root
def test_a_strangers_ray_is_named_and_not_joined(left, strangers_port, monkeypatch):
    """Whoever asks for the cluster that runs here gets no other user's, but the address to ask for."""
    said, started = [], []
    monkeypatch.setattr(cluster, "_start", lambda: started.append(True))
    left(f"127.0.0.1:{strangers_port}", STRANGER)
    assert cluster.start_ray(None, said.append)
    assert started == [True]
    (sentence,) = said
    assert f"127.0.0.1:{strangers_port}" in sentence
    assert "nobody" in sentence
    with pytest.raises(StudyError, match="none of yours runs on this machine"):
        cluster.start_ray("auto", said.append)
    assert started == [True]
