"""What is told of long work."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bimask import progress
from bimask.progress import Console, ToldProgress

ROOT = Path(__file__).parents[2]
LINE = "rounds  7/120  0:00:0"


class Log(io.StringIO):
    """Says when the line is there."""

    def __init__(self):
        super().__init__()
        self.told = threading.Event()

    def write(self, text):
        written = super().write(text)
        if LINE in self.getvalue():
            self.told.set()
        return written


def tellers():
    return [thread for thread in threading.enumerate() if thread.name == progress.NAME]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_gets_lines_while_the_work_goes_on(monkeypatch, terminal):
    monkeypatch.setattr(progress, "EVERY", 0.01)
    log = Log()
    with ToldProgress(Console(file=log, force_terminal=terminal, width=100)) as bars:
        bars.update(bars.add_task("searching triggers", total=4), completed=4)
        bars.update(bars.add_task("rounds", total=120), completed=7)
        if terminal:  # the bar says it
            assert not tellers()
        else:
            assert log.told.wait(30)
    assert not tellers()
    assert log.told.is_set() != terminal
    assert "searching triggers  4/4" not in log.getvalue()  # it has ended


READERLESS = """
import sys
from bimask.progress import outlive_readers
outlive_readers()
for number in range(20_000):
    print(number)
print("done", file=sys.stderr)
"""


def test_a_reader_that_leaves_is_no_failure():
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", READERLESS], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(writer)
    os.read(reader, 10)
    os.close(reader)
    _, said = process.communicate()
    assert (process.returncode, said) == (0, "done\n")
