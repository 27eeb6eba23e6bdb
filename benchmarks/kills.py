"""Does a study survive being killed and stopped, at whatever moment, in every way?

    python -m benchmarks.kills [--kills 30] [--seed 0]

A small study of digits runs as a user runs it. At a moment drawn anew for each run it is killed or
stopped in a way drawn anew, and gone on with by --resume, until it is whole; then the next one begins,
until so many kills have hit. At the end of each its records, files, Optuna's trials and MLflow's runs
are compared with those of the same study left alone. Linux alone: processes are found in /proc. Adds a
run to benchmarks/results/kills/ and writes benchmarks/kills.md.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import mlflow
import optuna
import typer
import yaml
from rich.console import Console
from safetensors.torch import load_file

from benchmarks import report
from benchmarks.pages.kills import KEPT
from benchmarks.purify import cpu_name
from study.store.provenance import commit

ROOT = Path(__file__).parents[1]
NAME = "kills"
STUDY = {
    "name": NAME,
    "trials": 16,
    "concurrency": 1,
    "sampler": "qmc",  # whose suggestions depend on nothing but a trial's number
    "paper_defaults": False,
    "clean_images_per_class": 2,
    "report_every": 2,
    "checkpoint_every": 1e-6,
    "victims": [
        {"dataset": "digits", "image_size": 8, "net": "small_resnet", "width": 2, "epochs": 6}
        | {"attack": {"name": "badnets"}, "min_clean_accuracy": 0.0, "min_attack_success": 0.0}
    ],
    "confirm": {"seeds": 4},
    "reference_point": {"clean_accuracy": 0.0, "attack_success": 1.0},
    "choose": {"max_accuracy_drop": 1.0},
    "fixed": {"inner_optimizer": "sign", "step_size": None, "patience": None, "inner_steps": 1}
    | {"initialise_rounds": 2, "minimise_rounds": 4, "select_rounds": 4},
    "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True}},
}
# Of a record: times, and what they make differ.
TIMES = {"seconds", "ended", "provenance", "files", "checksum"}
SIGNALS = {
    "SIGTERM to the group": signal.SIGTERM,
    "SIGHUP to the group": signal.SIGHUP,
    "SIGINT to the group": signal.SIGINT,
}
PARTS: dict[str, Callable[[str], bool]] = {
    "gcs_server dies": lambda words: "/gcs_server " in words,
    "the raylet dies": lambda words: "/raylet/raylet " in words,
    "an agent dies": lambda words: words.startswith("ray::") and "Agent" in words.split()[0],
    "a worker dies": lambda words: words.startswith("ray::") and "Agent" not in words.split()[0],
}
DRIVER = "SIGKILL to the driver"
KINDS = (DRIVER, *SIGNALS, *PARTS)
GOES_ON = {"a worker dies"}  # the study is not ended by it
LIMIT = 120.0  # seconds to an end: one that takes longer hangs
WHOLE = 900.0  # seconds of a run that is left alone


@dataclass
class Hit:
    """A kill: of which kind, how many seconds after the launch, in which phase, and what came of it.

    Attributes:
        code: the process's, or None where it went on.
        end: seconds until the process was gone.
        rays: seconds until nothing of its Ray was left, from there on.
        faults: what should not be, in words.
    """

    kind: str
    at: float
    phase: str
    code: int | None
    end: float
    rays: float
    faults: list[str]


class Run:
    """`python -m study.launch` in a session of its own; its Ray lies in `rays`."""

    def __init__(self, home: Path, rays: Path) -> None:
        self.home, self.rays = home, rays
        self.folder = home / "outputs" / NAME
        self.log = home / "log"
        (home / "study.yaml").write_text(yaml.safe_dump(STUDY))
        words = ["--resume", NAME] if (self.folder / "study.yaml").is_file() else ["study.yaml"]
        self.began = time.time()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "study.launch", *words, "--address", "local"],
                cwd=home,
                env=os.environ
                | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(rays)},
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_hear,
            )

    def said(self) -> str:
        return " ".join(self.log.read_text(errors="replace").split())

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        text = path.read_text() if path.is_file() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def phase(self) -> str:
        """Where it stands, by what it has said and written."""
        said, summary = self.log.read_text(errors="replace"), self.folder / "summary.json"
        if summary.is_file() and summary.stat().st_mtime > self.began:
            return "summary"
        if (self.folder / "confirm.jsonl").is_file():
            return "confirmation" if "checked" in said else "start"
        if "Configuration for experiment" in said:
            return "search"
        return "victims" if "checked" in said else "start"

    def processes(self) -> dict[int, str]:
        """Pid -> command line, of all that its Ray runs."""
        found = {}
        for pid in _descendants(self.process.pid) - {self.process.pid}:
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def wait(self, seconds: float) -> int | None:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _hear() -> None:
    """No signal is ignored, as it is by what a shell's background has started."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def _descendants(pid: int) -> set[int]:
    found = {pid}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found |= {one for child in task.read_text().split() for one in _descendants(int(child))}
        except OSError:
            continue
    return found


def hit(run: Run, draw: random.Random, kind: str) -> Hit | None:
    """Kill or stop a run in this way, and look at its end; None where it has no such process now."""
    rays = run.processes()
    which = [pid for pid, words in rays.items() if kind in PARTS and PARTS[kind](words)]
    if kind in PARTS and not which:
        return None
    before = run.lines("trials.jsonl")
    phase, at, began = run.phase(), time.time() - run.began, time.monotonic()
    try:
        if kind == DRIVER:
            run.process.kill()
        elif kind in SIGNALS:
            os.killpg(run.process.pid, SIGNALS[kind])
        else:
            os.kill(draw.choice(which), signal.SIGKILL)
    except ProcessLookupError:
        return None
    if kind in GOES_ON:
        return Hit(kind, at, phase, None, 0.0, 0.0, [])
    code = run.wait(LIMIT)
    ended = time.monotonic()
    while time.monotonic() - ended < LIMIT and _left(run, rays):
        time.sleep(0.1)
    left = _left(run, rays)
    faults = [f"{left} of Ray's processes or folders stay"] if left else []
    faults += _faults(run, kind, code, before)
    run.end()
    return Hit(kind, at, phase, code, ended - began, time.monotonic() - ended, faults)


def _left(run: Run, rays: dict[int, str]) -> int:
    """How much of a Ray is left: its processes and its folder."""
    alive = 0
    for pid in rays:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            alive += stat.rpartition(")")[2].split()[0] != "Z"
        except OSError:
            continue
    return alive + len(list(run.rays.iterdir()))


def _faults(run: Run, kind: str, code: int | None, before: list[dict[str, Any]]) -> list[str]:
    said, faults = run.said(), []
    expected = {DRIVER: -signal.SIGKILL} | {name: 128 + number for name, number in SIGNALS.items()}
    early = not (run.folder / "study.yaml").is_file()
    wanted = {expected.get(kind, 1)}
    if kind in SIGNALS and "checked" not in said:  # Python itself may not have begun
        wanted |= {-SIGNALS[kind], 130 if kind.startswith("SIGINT") else 128 + SIGNALS[kind]}
    if code is None:
        faults.append("it hangs")
    elif code not in wanted and not (code == 0 and "python -m study.report" in said):
        faults.append(f"its code is {code}")
    if kind != DRIVER and "Traceback" in said:
        faults.append("it prints a traceback")
    if kind in PARTS and code and not early and "--resume" not in said:
        faults.append("it does not name --resume")
    after = run.lines("trials.jsonl")
    if after[: len(before)] != before:
        faults.append("records have changed")
    return faults


def whole(home: Path, alone: Path) -> dict[str, int]:
    """Of a study that is whole: how many trials are lost, doubled, left RUNNING, or differ from those
    of the study that was left alone."""
    folder, reference = home / "outputs" / NAME, alone / "outputs" / NAME
    numbers = list(range(int(str(STUDY["trials"]))))

    def rows(place: Path, name: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (place / name).read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in TIMES} for row in found]

    def known(counted: list[int]) -> tuple[int, int]:
        return len(set(numbers) - set(counted)), len(counted) - len(set(counted))

    trials = rows(folder, "trials.jsonl")
    asked = optuna.load_study(study_name=NAME, storage=f"sqlite:///{folder / 'optuna.db'}").trials
    client = mlflow.MlflowClient(f"sqlite:///{home / 'outputs/mlflow.db'}")
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = client.search_runs(experiments)
    told = [int(one.data.tags["trial"]) for one in runs if "trial" in one.data.tags]
    counts = [known([row["number"] for row in trials]), known([t.number for t in asked]), known(told)]
    running = sum(not trial.state.is_finished() for trial in asked)
    running += sum(one.info.status == "RUNNING" for one in runs)

    def by_number(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(str(row.get(key)) for key in ("number", "configuration", "victim", "seed"))

    differ = 0
    for name in ("trials.jsonl", "confirm.jsonl"):
        mine, other = (sorted(rows(place, name), key=by_number) for place in (folder, reference))
        differ += abs(len(mine) - len(other)) + sum(a != b for a, b in zip(mine, other, strict=False))
    for number in numbers:
        for kept in (reference / f"trials/{number:03d}").glob("*.safetensors"):
            masks, again = load_file(kept), folder / f"trials/{number:03d}" / kept.name
            there = load_file(again) if again.is_file() else {}
            differ += not all(n in there and bool((there[n] == v).all()) for n, v in masks.items())
    lost, doubled = (sum(count[at] for count in counts) for at in (0, 1))
    return {"lost": lost, "doubled": doubled, "running": running, "differ": differ}


def main(
    kills: Annotated[int, typer.Option(min=1, help="Kills that hit.")] = 30,
    seed: Annotated[int, typer.Option(help="Of the moments and kinds.")] = 0,
    within: Annotated[float, typer.Option(help="Seconds after a launch in which a kill falls.")] = 40.0,
    minutes: Annotated[float, typer.Option(help="No study is begun, nor killed, after that.")] = 1e9,
) -> None:
    """Kill studies, resume them, compare them with one that was left alone."""
    console, draw = Console(), random.Random(seed)
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="kills-", ignore_cleanup_errors=True) as folder:
        top = Path(folder)
        rays = top / "r"
        rays.mkdir()
        store = top / "mlflow.db"
        mlflow.MlflowClient(f"sqlite:///{store}").search_experiments()  # its tables take seconds

        def home(name: str) -> Path:
            (top / name / "outputs").mkdir(parents=True)
            shutil.copy(store, top / name / "outputs")
            return top / name

        alone = home("alone")
        run = Run(alone, rays)
        if run.wait(WHOLE) != 0:
            run.end()
            raise SystemExit(f"The study ends with {run.process.returncode}: {run.said()}")
        hits: list[Hit] = []
        ends: list[dict[str, int]] = []
        while len(hits) < kills and time.monotonic() < end:
            place = home(f"study-{len(ends)}")
            hits += _until_whole(place, rays, draw, kills - len(hits), within, end, console)
            ends.append(whole(place, alone))
            console.print(ends[-1])
    run_record = {
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "date": date.today().isoformat(),
        "commit": commit(),
        "seed": seed,
        "trials": STUDY["trials"],
        "hits": [asdict(one) for one in hits],
        "ends": ends,
    }
    runs = json.loads(KEPT.read_text()) if KEPT.is_file() else []
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps([*runs, run_record], indent=1) + "\n")
    report.write()


def _until_whole(
    home: Path,
    rays: Path,
    draw: random.Random,
    most: int,
    within: float,
    end: float,
    console: Console,
) -> list[Hit]:
    """Launch, kill and resume one study until it is whole; the kills that hit."""
    hits: list[Hit] = []
    while True:
        run = Run(home, rays)
        while run.process.poll() is None:
            if len(hits) >= most or time.monotonic() > end:
                if run.wait(WHOLE) is None:
                    run.end()
                break
            if run.wait(draw.uniform(0, within)) is not None:
                break
            found = hit(run, draw, draw.choice(KINDS))
            if found is not None:
                hits.append(found)
                console.print(found)
                if found.faults:
                    console.print(run.said()[-3000:], markup=False, highlight=False)
        if run.process.returncode == 0 and run.lines("trials.jsonl"):
            return hits
        killed = hits and (hits[-1].code is None or hits[-1].code == run.process.returncode)
        if not killed:
            message = f"It ended by itself with {run.process.returncode}: {run.said()[-3000:]}"
            hits.append(Hit("nothing", 0.0, run.phase(), run.process.returncode, 0.0, 0.0, [message]))
            console.print(hits[-1], markup=False)
            if len(hits) > 2 and hits[-2].kind == "nothing":
                return hits


if __name__ == "__main__":
    typer.run(main)
