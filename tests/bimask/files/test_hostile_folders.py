"""Folders of strangers, victims, imported ones and cleaned models: refused by the commands in one
sentence, nothing of them run, nothing written. Foreign files are in interop/test_hostile.py."""

import hashlib
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bimask.__main__ import app
from bimask.errors import BimaskError
from bimask.interop import save_imported
from bimask.interop.backdoorbench_writer import clean_positions
from bimask.victims import VictimSpec, obtain_victim
from bimask.victims.imported import assemble

HASTY = {"image_size": 8, "width": 2, "epochs": 1, "min_clean_accuracy": 0, "min_attack_success": 0}
ONE_ROUND = {"initialise_rounds": 1, "minimise_rounds": 1, "select_rounds": 1, "inner_steps": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One whole folder of each kind, and settings to purify with."""
    root = tmp_path_factory.mktemp("made")
    victim = obtain_victim(VictimSpec(**HASTY), root / "victims")
    sets = victim.eval_sets(victim.spec.load_data(), "test")
    wanted = victim.attack.attack_labels(sets.clean.labels, sets.clean.num_classes)
    imported = assemble(
        source="backdoorbench",
        net="small_resnet",
        weights=(victim.model, 2),
        dataset="digits",
        clean=sets.clean,
        triggered=sets.triggered,
        clean_index=clean_positions(sets, wanted),
    )
    settings = {"inner_optimizer": "sign", "step_size": None, "patience": None} | ONE_ROUND
    (root / "best.yaml").write_text(yaml.safe_dump({"purify": settings}))
    save_imported(imported, root / "imported", source=root / "best.yaml")
    trained = root / "victims" / victim.spec.digest
    words = f"purify --victim {trained} --config {root / 'best.yaml'} --out {root / 'cleaned'}"
    done = CliRunner().invoke(app, [*words.split(), "--clean-images-per-class", "2"])
    assert done.exit_code == 0, done.output
    return SimpleNamespace(victim=trained, imported=root / "imported", cleaned=root / "cleaned")


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """kind -> a copy of that folder; the working directory has a package that marks its being run."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "__init__.py").write_text("open('RUN', 'w')\n")
    (tmp_path / "evil" / "net.py").write_text("open('RUN', 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda kind: shutil.copytree(getattr(made, kind), tmp_path / kind)


def refused(command, words):
    """The one sentence of a command that writes nothing."""
    before = sorted(os.walk("."))
    told = {
        "gallery": ["gallery", words, "--out", "out/picture.png"],
        "audit": ["audit", "--victim", words, "--out", "out"],
        "purify": ["purify", "--victim", words, "--config", "best.yaml", "--out", "out"],
        "export": ["export", words, "out/model.pt2"],
        "export-backdoorbench": ["export-backdoorbench", words, "out/record/x"],
    }
    if command == "purify":
        with open("best.yaml", "w") as file:
            yaml.safe_dump({"purify": ONE_ROUND}, file)
        before = sorted(os.walk("."))
    done = CliRunner().invoke(app, [str(word) for word in told[command]])
    assert isinstance(done.exception, BimaskError), repr(done.exception)
    assert sorted(os.walk(".")) == before, "something was written, or run"
    text = str(done.exception)
    assert not re.search(r"\n|\x1b|Traceback", text), text
    return text


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest(change):
    """Change the manifest, with the digest that goes with it, as someone who knows how would."""

    def spoil(folder):
        about = json.loads((folder / "manifest.json").read_text())
        change(about)
        if "spec_digest" in about:
            about["spec_digest"] = VictimSpec.model_validate(about["spec"]).digest
        (folder / "manifest.json").write_text(json.dumps(about))

    return spoil


def says(**changes):
    return manifest(lambda about: about.update(changes))


def spec(**changes):
    return manifest(lambda about: about["spec"].update(changes))


def own_net(name):
    """The manifest names the code of a net; its digest cannot be had without running it."""

    def spoil(folder):
        path = folder / "manifest.json"
        about = json.loads(path.read_text())
        about.get("spec", about)["net"] = name
        path.write_text(json.dumps(about))

    return spoil


def tensors(file, change):
    """Change a file of tensors, and its digest in the manifest."""

    def spoil(folder):
        save_file(change(load_file(folder / file)), folder / file)
        sign(folder, file)

    return spoil


def sign(folder, file):
    about = json.loads((folder / "manifest.json").read_text())
    kind = {"victim.safetensors": "weights", "weights.safetensors": "weights"}.get(file, "images")
    about[f"{kind}_sha256"] = sha256(folder / file)
    (folder / "manifest.json").write_text(json.dumps(about))


def pickled(file):
    class Hostile:
        def __reduce__(self):
            return (open, ("RUN", "w"))

    def spoil(folder):
        torch.save(Hostile(), folder / file)
        sign(folder, file)

    return spoil


def pipe(file):
    """It would be waited for without end."""

    def spoil(folder):
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return spoil


def written(text):
    return lambda folder: (folder / "manifest.json").write_text(text)


def stored(name, change):
    return tensors("images.safetensors", lambda all_: all_ | {name: change(all_[name]).contiguous()})


NESTED = "[" * 100_000 + "]" * 100_000

VICTIMS = {
    "nested": (written(NESTED), "nested too deep"),
    "endless": (lambda folder: os.truncate(folder / "manifest.json", 2**40), "at most 16777216"),
    "a pipe": (pipe("manifest.json"), "not a regular file"),
    "own code": (own_net("evil.net:make"), "may do anything"),
    "a width of petabytes": (spec(width=10**6), "numbers, but its file of weights holds"),
    "a width of gigabytes": (spec(width=8000), "numbers, but its file of weights holds"),
    "channels without end": (says(in_channels=10**9), "less than or equal to 1024"),
    "channels in words": (says(in_channels="many"), "valid integer"),
    "classes in numbers": (says(classes=list(range(10))), "valid string"),
    "classes without end": (says(classes=["x"] * 10**5), "numbers, but its file of weights holds"),
    "no classes": (says(classes=[]), "at least 1 item"),
    "a size in words": (says(image_size="large"), "valid integer"),
    "scores in words": (
        manifest(lambda about: about["scores"]["val"].update(attack_success="much")),
        "valid number",
    ),
    "scores of nothing": (
        manifest(lambda about: about["scores"]["val"].update(attack_success=float("nan"))),
        "not learned",
    ),
    "a digest by number": (says(weights_sha256=7), "valid string"),
    "weights as a pickle": (pickled("victim.safetensors"), "do not fit"),
    "weights as a pipe": (pipe("victim.safetensors"), "is missing"),
    "a victim within": (own_net("small_resnet\x1b[31m"), "cannot be read"),
}
IMPORTED = {
    "nested": (written(NESTED), "nested too deep"),
    "own code": (own_net("evil.net:make"), "net of its own"),
    "own file": (own_net("evil/net.py:make"), "net of its own"),
    "a label too high": (stored("clean_labels", lambda x: x + 90), "labels that are not all of 0 to 9"),
    "a label below zero": (stored("true_labels", lambda x: x - 9), "labels that are not all of"),
    "labels as fractions": (
        stored("attack_labels", lambda x: x.float()),
        "405 labels as torch.float32",
    ),
    "labels of few": (stored("attack_labels", lambda x: x[:3]), r"405 labels as torch.int64 \(3,\)"),
    "other channels": (
        stored("triggered_images", lambda x: x.expand(-1, 3, -1, -1)),
        r"\(405, 3, 8, 8\) beside clean ones of \(1, 8, 8\)",
    ),
    "fractions as images": (stored("triggered_images", lambda x: x.float()), "images of torch.float32"),
    "a position too far": (stored("clean_index", lambda x: x + 100), "positions that are not all of"),
    "no images": (
        stored("clean_images", lambda x: x[:0]),
        "0 images need as many labels",
    ),
    "images of no size": (stored("clean_images", lambda x: x[..., :0]), "sides of 1 to 1024"),
    "images as a pipe": (pipe("images.safetensors"), "no file images.safetensors|cannot be read"),
    "weights as a pipe": (pipe("weights.safetensors"), "no file weights.safetensors"),
    "images as a pickle": (pickled("images.safetensors"), "cannot be read"),
    "NaN": (
        tensors("weights.safetensors", lambda s: {k: v * torch.nan for k, v in s.items()}),
        "NaN or infinite",
    ),
}
CLEANED = {
    "nested": (written(NESTED), "nested too deep"),
    "a list": (written("[]"), "valid dictionary"),
    "own code": (manifest(lambda about: about["net"].update(net="evil.net:make")), "may do anything"),
    "a net by number": (manifest(lambda about: about["net"].update(net=7)), "cannot be read"),
    "a width of gigabytes": (
        manifest(lambda about: about["net"].update(width=8000)),
        "numbers, but its file of weights holds",
    ),
    "images without end": (says(image=[1, 10**6, 10**6]), "less than or equal to 1024"),
    "classes without end": (says(classes=["x"] * 10**5), "numbers, but its file of weights holds"),
    "gates at nothing": (says(gates=["nowhere"]), "do not fit"),
    "a file outside": (says(files={"../../../etc/passwd": "0"}), "Cannot read .*cleaned/passwd"),
    "the folder above": (says(files={"..": "0"}), "not a file"),
    "a model as a pipe": (
        lambda folder: (says(files={})(folder), pipe("model.safetensors")(folder)),
        "holds no file model.safetensors",
    ),
}


@pytest.mark.parametrize("kind", VICTIMS)
def test_victims_of_strangers_are_refused(folder, kind):
    spoil, words = VICTIMS[kind]
    path = folder("victim")
    spoil(path)
    for command in ("gallery", "audit", "purify", "export-backdoorbench"):
        assert re.search(words, refused(command, path)), command


@pytest.mark.parametrize("kind", IMPORTED)
def test_imported_victims_of_strangers_are_refused(folder, kind):
    spoil, words = IMPORTED[kind]
    path = folder("imported")
    spoil(path)
    for command in ("gallery", "audit", "purify"):
        assert re.search(words, refused(command, path)), command


@pytest.mark.parametrize("kind", CLEANED)
def test_cleaned_models_of_strangers_are_refused(folder, kind):
    spoil, words = CLEANED[kind]
    path = folder("cleaned")
    spoil(path)
    assert re.search(words, refused("export", path))


def test_the_package_is_hostile_indeed(folder, tmp_path):
    try:
        import evil.net  # noqa: F401
    finally:  # other files of tests in this process look for it
        for name in ("evil.net", "evil"):
            sys.modules.pop(name, None)
    assert (tmp_path / "RUN").exists()
