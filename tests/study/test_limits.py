"""A trial that hangs, or eats the memory, in a process of its own."""

import subprocess
import sys
from pathlib import Path

from study.limits import STACK, where_it_hung

ROOT = Path(__file__).parents[2]


def run(code, folder):
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT
    )


def test_code_that_never_comes_back_is_ended_and_says_where_it_was(tmp_path):
    """One huge power, so that no Python thread gets a turn; the file is named as an actor's."""
    code = (
        "import sys; from pathlib import Path; from study.limits import time_limit\n"
        "source = 'def hang():\\n    return 3 ** (10 ** 9) % 7\\nhang()'\n"
        "with time_limit(0.5, Path(sys.argv[1])):\n"
        "    exec(compile(source, 'study/search/actor.py', 'exec'))"
    )
    done = run(code, tmp_path)
    assert done.returncode == 1
    assert where_it_hung(tmp_path) == "study/search/actor.py, line 2, in hang"


def test_what_ends_in_time_is_left_alone(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from study.limits import time_limit\n"
        "with time_limit(0.5, Path(sys.argv[1])):\n    pass\n"
        "with time_limit(None, Path(sys.argv[1]) / 'no'):\n    pass\n"
        "time.sleep(1); print('alive')"
    )
    assert run(code, tmp_path).stdout == "alive\n"
    assert not (tmp_path / STACK).exists()
    assert not (tmp_path / "no").exists()
    assert where_it_hung(tmp_path) is None


def test_memory_beyond_the_limit_is_an_error_of_the_trial_alone(tmp_path):
    code = (
        "import torch; from study.limits import memory_limit\n"
        "held = torch.ones(2**26)\n"  # 256 MiB that the process has already
        "with memory_limit(0.5):\n"
        "    torch.ones(2**25).sum()\n"
        "    try:\n        torch.ones(2**28)\n"
        "    except RuntimeError as error:\n        print('memory' in str(error))\n"
        "print(len(torch.ones(2**28)))"
    )
    done = run(code, tmp_path)
    assert done.stdout.split() == ["True", str(2**28)], done.stderr
