"""What the pages of the docs take for granted, but tiny: a suspect, pictures, studies, victims.

`make_project` copies the sources to a folder outside of git, with tiny studies under the names of the
real ones; `make_home` makes a user's folder, of which every page has a copy.
"""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from bimask import VictimSpec, load_data, train_victim

ROOT = Path(__file__).parents[1]
FACTORY = """
from torch import nn


def make(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, num_classes),
    )


factory = make
"""
CLASSES, PICTURES = 4, 13  # of the suspect
SETTINGS = {
    **{"inner_optimizer": "sign", "step_size": None, "patience": None, "loss_form": "log"},
    **{"initialise_rounds": 2, "minimise_rounds": 2, "select_rounds": 4, "inner_steps": 1},
    **{"initial_mask": 0.6, "initial_selection": 0.8},  # few rounds from 1 leave masks that do nothing
}
SPACE = {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3, "log": True}}
VICTIM = {"dataset": "digits", "image_size": 12, "net": "small_resnet", "width": 4, "epochs": 10}
KEYS = {
    "paper_defaults": False,
    "clean_images_per_class": 3,
    "report_every": 2,
    "choose": {"max_accuracy_drop": 1.0},
    "fixed": SETTINGS,
    "space": SPACE,
}
STUDY = KEYS | {
    "name": "ims-digits",
    "trials": 3,
    "victims": [VICTIM | {"attack": {"name": "badnets"}}],
    "confirm": {"seeds": 2, "paper_seeds": 0},
    "gates": {"accuracy_drop": 1, "attack_success": 1, "spread": 1, "seeds": 2},
    "reference_point": {"clean_accuracy": 0.3, "attack_success": 1.0},
}
BLENDED = VICTIM | {"attack": {"name": "blended"}, "min_attack_success": 0}
SUITE = STUDY | {
    "name": "ims-digits-suite",
    "trials": 2,
    "sampler": "tpe",
    "victims": [*STUDY["victims"], BLENDED],
    "held_out": [BLENDED | {"attack": {"name": "low_frequency"}}],
    "controls": [VICTIM | {"poisoning_rate": 0}],
}
SUSPECT = KEYS | {
    "name": "suspect",
    "trials": 2,
    "selection": "blind",
    "clean_images_per_class": 4,
    "reference_point": {"clean_accuracy": 0.0},
}
STUDIES = {"ims_digits": STUDY, "ims_digits_suite": SUITE, "suspect": SUSPECT}
VICTIMS = {
    "common": VICTIM | {"epochs": 6},
    "victims": [{"poisoning_rate": 0}, {"attack": {"name": "badnets"}}],
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))


def make_project(folder):
    """The sources as somebody has them who downloaded them."""
    for name in ("bimask", "study", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", folder)  # benchmarks write a table into it
    for name, study in STUDIES.items():
        write(folder / "search_spaces" / f"{name}.yaml", study)


def make_home(home):
    """A user's folder."""
    for path in ("mine.py", "net.py", "models/mine.py"):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(FACTORY)
    for name, study in STUDIES.items():
        write(home / "search_spaces" / f"{name}.yaml", study)
    write(home / "tiny.yaml", STUDY | {"name": "tiny"})
    write(home / "settings.yaml", {"purify": SETTINGS})
    write(home / "victims" / "digits.yaml", VICTIMS)
    digits = load_data("digits", image_size=12)
    for split, place, most in ((digits.train, "theirs", 60), (digits.test, "pictures", PICTURES)):
        for label in range(CLASSES):
            (folder := home / place / str(label)).mkdir(parents=True)
            for row, image in enumerate(split.images[split.labels == label][:most]):
                Image.fromarray(image[0].numpy()).save(folder / f"{row}.png")
    spec = {"dataset": f"imagefolder:{home / 'theirs'}", "net": f"{home / 'net.py'}:make"}
    spec |= {"epochs": 12, "batch_size": 32, "min_attack_success": 0}
    state = train_victim(VictimSpec(**spec)).model.net.state_dict()
    shutil.rmtree(home / "theirs")
    for name in ("suspect.pth", "weights.pth"):
        torch.save(state, home / name)
    save_file({key: value.contiguous() for key, value in state.items()}, home / "w.safetensors")
    runpy.run_path(str(ROOT / "tests" / "own_detector.py"))["make_detector"](home / "detector")
    common = runpy.run_path(str(ROOT / "examples" / "common.py"))
    common["attack_result"](home / "record" / "badnet_0_1", home / "data" / "cifar10")


class Page:
    """A copy of the user's folder, and the commands that run in it.

    Args:
        name: of the page.
        home: what `make_home` made.
        project: what `make_project` made.
    """

    def __init__(self, name, home, project):
        self.folder = home.parent / name.replace("/", "-")
        shutil.copytree(home, self.folder)
        (self.folder / "home").mkdir()
        self.exports = ""
        strangers = ("MLFLOW_TRACKING_URI", "BIMASK_OUTPUTS", "BIMASK_STORAGE", "MAKEFLAGS")
        self.environment = {key: value for key, value in os.environ.items() if key not in strangers} | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(project),
            "HOME": str(self.folder / "home"),
            "MPLCONFIGDIR": str(home.parent),
            "RAY_ADDRESS": "local",
            "RAY_worker_niceness": "0",
            "OMP_NUM_THREADS": "1",
            "GIT_CEILING_DIRECTORIES": str(home.parent),  # the sources count as committed
            "BIMASK_COMMIT": "0123456789ab",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }

    def start(self, command):
        """The command in a process group of its own, with what the page exported before it."""
        return subprocess.Popen(
            ["bash", "-c", self.exports + command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command):
        """What the command prints; it must end with 0."""
        process = self.start(command)
        printed, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, f"{command}\n{printed}"
        if command.startswith("export "):
            self.exports += f"{command}; "
        return printed

    def digest(self):
        """Of a victim that is there."""
        return max(path.name for path in (self.folder / "outputs" / "victims").iterdir())

    # --- what pages take for granted ---

    def environment_made(self):
        """What `make` makes first, without asking the network for it."""
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, self.folder)
        (self.folder / ".venv").mkdir()
        for path in Path(sys.prefix).iterdir():
            if not path.name.startswith(".installed"):
                (self.folder / ".venv" / path.name).symlink_to(path)
        (self.folder / ".venv" / ".installed").touch()

    def finished_study(self):
        """A study called mine."""
        self.run("python -m study.launch search_spaces/ims_digits.yaml --name mine")

    def second_champion(self):
        """Another trial is registered as version 2, and has the alias whatever its scores are."""
        summary = json.loads((self.folder / "outputs" / "mine" / "summary.json").read_text())
        other = next(number for number in range(3) if number != summary["chosen"]["number"])
        self.run(f"python -m study.promote mine --trial {other} --confirm --apply")
        code = (
            "from study.promotion.registry import Registry\n"
            "registry = Registry('sqlite:///outputs/mlflow.db', 'mine')\n"
            "first, second = registry.versions()\n"
            "if registry.champion().number == '1':\n"
            "    registry.set_champion(second)"
        )
        self.run(f'python -c "{code}"')

    def cut_short(self):
        """A study called cut, ended by Ctrl-C after its first trial."""
        words = "--name cut --trials 8 --concurrency 1"
        process = self.start(f"exec python -m study.launch tiny.yaml {words}")
        records = self.folder / "outputs" / "cut" / "trials.jsonl"
        deadline = time.monotonic() + 600
        while process.poll() is None and not (records.is_file() and records.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 130, printed
        assert len(records.read_text().splitlines()) < 8

    def no_victims(self):
        """As if none had been trained."""
        shutil.rmtree(self.folder / "outputs" / "victims")
