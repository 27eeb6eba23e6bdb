"""What is told of long work."""

import io
import time

import pytest
from rich.console import Console

from bimask.commands import progress
from bimask.commands.progress import ToldProgress


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_gets_lines_while_the_work_goes_on(monkeypatch, terminal):
    monkeypatch.setattr(progress, "EVERY", 0.01)
    out = io.StringIO()
    with ToldProgress(Console(file=out, force_terminal=terminal, width=100)) as bars:
        bars.update(bars.add_task("searching triggers", total=4), completed=4)
        bars.update(bars.add_task("rounds", total=120), completed=7)
        until = time.monotonic() + (20 if not terminal else 0.3)
        while time.monotonic() < until and "rounds  7/120  0:00:0" not in out.getvalue():
            time.sleep(0.01)
        told = out.getvalue()
    assert ("rounds  7/120  0:00:0" in told) != terminal  # on a terminal the bar says it
    assert "searching triggers  4/4" not in told  # it has ended
    length = len(out.getvalue())
    time.sleep(0.05)
    assert len(out.getvalue()) == length
