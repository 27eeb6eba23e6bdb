"""Hosts on one machine: each a network, PID, mount and host-name namespace with an sshd in it.

What runs in a host is root with a home, processes, /tmp and /run of its own, and sees no network but
the other hosts': there is no way out. When `Hosts` is left, every process in it has ended and every
namespace is gone. Needs root, iproute2, util-linux, rsync, curl and openssh-server.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

NETWORK = "10.77.0"
SPACE = f"bimask-{os.getpid()}"  # what every namespace's name begins with
SWITCH = f"{SPACE}-switch"
HOME = "/home/host"  # root's, in a host: the machine's own may hold the Python that runs there
NEEDED = (
    "ip",
    "setpriv",
    "unshare",
    "nsenter",
    "ss",
    "ssh",
    "ssh-keygen",
    "rsync",
    "curl",
    "/usr/sbin/sshd",
)
INIT = """\
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /mnt
mkdir /mnt/keys /mnt/shared /mnt/project
mount --bind {folder}/keys /mnt/keys
mount --bind {folder}/shared /mnt/shared
mount --bind -o ro {project} /mnt/project
for place in /tmp /home /run /dev/shm; do mount -t tmpfs tmpfs $place; done
mount --bind /mnt/keys/passwd /etc/passwd
mkdir -p /run/sshd {home}/.ssh
cp /mnt/keys/id_ed25519 {home}/.ssh/ && chmod 600 {home}/.ssh/id_ed25519
cp /mnt/keys/id_ed25519.pub {home}/.ssh/authorized_keys
touch {home}/.bashrc
hostname {name}
/usr/sbin/sshd -D -e -f /mnt/keys/sshd_config -o ListenAddress={address} 2> /mnt/keys/{name}.log &
touch /mnt/keys/{name}.up
wait $!
"""  # bash stays process 1: it reaps what daemons leave


def missing() -> list[str]:
    """What this machine lacks to make hosts."""
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    return lacking + ([] if os.geteuid() == 0 else ["root"])


def run(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr or done.stdout}")
    return done.stdout


class Hosts:
    """`names` as hosts with addresses; a context manager.

    Args:
        folder: for keys and for /mnt/shared, which all hosts have in common; it must not be below /mnt.
        project: what each host sees at /mnt/project, for reading.
    """

    def __init__(self, names: list[str], folder: Path, project: Path) -> None:
        self.addresses = {name: f"{NETWORK}.{10 + i}" for i, name in enumerate(names)}
        self.folder, self.project = folder, project
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Hosts:
        keys = self.folder / "keys"
        for path in (keys, self.folder / "shared"):
            path.mkdir()
        for name in ("id_ed25519", "host"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name))
        (keys / "sshd_config").write_text(
            "HostKey /mnt/keys/host\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
            "UsePAM no\nStrictModes no\nPidFile none\nMaxStartups 50\nMaxSessions 50\n"
        )
        users = Path("/etc/passwd").read_text().splitlines()
        users = [f"root:x:0:0:root:{HOME}:/bin/bash" if u.startswith("root:") else u for u in users]
        (keys / "passwd").write_text("\n".join(users) + "\n")
        try:
            run("ip", "netns", "add", SWITCH)
            run("ip", "-n", SWITCH, "link", "add", "cable", "type", "bridge")
            run("ip", "-n", SWITCH, "addr", "add", f"{NETWORK}.1/24", "dev", "cable")
            run("ip", "-n", SWITCH, "link", "set", "cable", "up")
            for name, address in self.addresses.items():
                self._plug(name, address)
                self._boot(name, address)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _plug(self, name: str, address: str) -> None:
        space, port = f"{SPACE}-{name}", f"p-{name}"
        run("ip", "netns", "add", space)
        pair = ("type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "-n", SWITCH, "link", "add", port, *pair)
        run("ip", "-n", SWITCH, "link", "set", port, "master", "cable", "up")
        run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            run("ip", "-n", space, "link", "set", device, "up")
        # Ray finds its own address by the way to the world; this one ends at the switch.
        run("ip", "-n", space, "route", "add", "default", "via", f"{NETWORK}.1")

    def _boot(self, name: str, address: str) -> None:
        script = INIT.format(
            name=name, address=address, home=HOME, folder=self.folder, project=self.project
        )
        command = ["setpriv", "--pdeathsig", "KILL"]  # gone with us, however we end
        command += ["ip", "netns", "exec", f"{SPACE}-{name}", "unshare", "--pid", "--mount", "--uts"]
        command += ["--ipc", "--fork", "--kill-child=KILL", "bash", "-c", script]
        plain = {"PATH": os.environ["PATH"], "HOME": HOME, "LANG": "C.UTF-8"}
        self.processes[name] = subprocess.Popen(command, env=plain, start_new_session=True)
        deadline = time.monotonic() + 60
        while not (self.folder / "keys" / f"{name}.up").exists():
            if time.monotonic() > deadline or self.processes[name].poll() is not None:
                raise RuntimeError(f"host {name} did not start")
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)  # process 1 goes with it, and so all the others
            process.wait(30)
        for space in (*(f"{SPACE}-{name}" for name in self.addresses), SWITCH):
            run("ip", "netns", "delete", space, check=False)

    def inside(self, name: str) -> list[str]:
        """What to put in front of a command so that it runs in a host."""
        (child,) = Path(f"/proc/{self.processes[name].pid}/task").iterdir()
        init = (child / "children").read_text().split()[0]
        return ["nsenter", "--target", init, "--all"]

    def do(self, name: str, script: str, *, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a bash script in a host, as its root would in a fresh shell."""
        plain = {"PATH": os.environ["PATH"], "HOME": HOME, "LANG": "C.UTF-8", "USER": "root"}
        command = [*self.inside(name), "bash", "-c", f"cd\n{script}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=plain)
