"""A program beside a Ray of our own: when the process that started both is gone, so is the Ray.

`python watchdog.py FOLDER`. Each line of standard input is the id of a process that leads a session of
its own. When standard input ends, which it does however its writer ends, what FOLDER/last-words says is
printed on standard error, all processes of these sessions are killed, and the folder is removed. It
imports the standard library alone, to be small.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

LAST_WORDS = "last-words"
ATTEMPTS = 300  # at killing, a tenth of a second apart: a process in the kernel dies when it comes back


def members(sessions: set[int]) -> list[int]:
    """The processes of these sessions that are not yet dead."""
    found = []
    for process in _processes():
        try:
            if os.getsid(process) in sessions and not _is_dead(process):
                found.append(process)
        except OSError:  # it has ended since
            continue
    return found


def _processes() -> list[int]:
    if os.path.isdir("/proc/self"):
        return [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    listed = subprocess.run(["ps", "-axo", "pid="], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def _is_dead(process: int) -> bool:
    """Whether it waits for its parent to take notice of its end."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return False


def end(sessions: set[int]) -> None:
    """Kill all processes of these sessions, also those that they start in the meantime."""
    for _ in range(ATTEMPTS):
        left = members(sessions)
        if not left:
            return
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(0.1)


def say_last_words(folder: str) -> None:
    """Print what the process that is gone wanted said, and let go of where it is printed to."""
    try:
        with open(os.path.join(folder, LAST_WORDS), encoding="utf-8") as file:
            text = file.read()
        if text:
            print(text, file=sys.stderr, flush=True)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 2)  # whoever reads that to its end waits no longer
    except OSError:  # it left none, or nobody is there
        return


def main() -> None:
    """Wait for the end of standard input, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # whoever ends a whole group does not mean us: see above
    sessions = {int(line) for line in sys.stdin}
    say_last_words(sys.argv[1])
    end(sessions)
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
