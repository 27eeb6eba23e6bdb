"""Code that a file names runs in `launch` of a file on the command line or with --trust-code alone."""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from bimask.__main__ import app
from bimask.errors import BimaskError, SettingError, VictimError
from bimask.nets import code_of_files, source_of
from bimask.victims import VictimSpec, load_suite, obtain_victim
from study import launch, victims
from study.promotion.candidate import load_victims
from study.report import __main__ as report
from study.search.interrupts import InterruptedStudyError, LostRayError
from study.search.warm_start import read_earlier
from study.spec.reading import load_config
from study.spec.suspect import SuspectSpec
from study.store.session import Identity

OLD = Path(__file__).parent / "store" / "schema_1"
CODE = """
from pathlib import Path

from torch import nn

Path("RUN").touch()


def make(num_classes):
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(8, num_classes))
"""
NETS = ["evil.deep.net:make", "own.py:make"]
HASTY = {"image_size": 8, "epochs": 1, "min_clean_accuracy": 0, "min_attack_success": 0}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with code that leaves a file where it is run."""
    for package in ("evil", "evil/deep"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("open('RUN', 'w')\n")
    for place in ("evil/deep/net.py", "own.py"):
        (tmp_path / place).write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    _forget()  # other tests have modules of this name as well
    yield tmp_path
    _forget()


def _forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "evil"]:
        del sys.modules[name]


def study(net, **keys):
    content = {
        "name": "own",
        "trials": 2,
        "clean_images_per_class": 2,
        "paper_defaults": False,
        "victims": [{**HASTY, "net": net}],
        "reference_point": {"clean_accuracy": 0.0, "attack_success": 1.0},
        "fixed": {"inner_optimizer": "sign", "step_size": None, "patience": None}
        | {"initialise_rounds": 1, "minimise_rounds": 1, "select_rounds": 1, "inner_steps": 1},
        "space": {"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3}},
    }
    Path("own.yaml").write_text(yaml.safe_dump(content | keys))
    return Path("own.yaml")


def ran():
    done = Path("RUN").exists()
    Path("RUN").unlink(missing_ok=True)
    return done


def code_of(command, *words, **options):
    with pytest.raises(SystemExit) as caught:
        command(*words, **options)
    return caught.value.code


@pytest.mark.parametrize("net", NETS)
def test_reading_imports_nothing(here, net):
    config = load_config(study(net))
    assert config.victims[0].net_sha256
    Path("suite.yaml").write_text(yaml.safe_dump({"victims": [{**HASTY, "net": net}]}))
    load_suite(Path("suite.yaml"))
    Path("pictures").mkdir()
    Path("w").write_bytes(b"")
    SuspectSpec(model="w", net=net, clean="pictures")
    read_earlier(config)
    assert not ran()
    assert "evil" not in sys.modules


def test_where_a_module_is_is_found_without_an_import(here):
    assert source_of(NETS[0]) == here / "evil" / "deep" / "net.py"
    for odd in ("evil.nowhere.net", "evil.deep.net.more", "nowhere.at.all", "sys", "__main__.x"):
        with pytest.raises(SettingError, match="There is no module"):
            source_of(f"{odd}:make")
    assert source_of("torch.nn.modules.linear:Linear").name == "linear.py"
    assert not ran()


@pytest.mark.parametrize("net", NETS)
def test_a_dry_run_runs_nothing_unless_told(here, net, capsys):
    assert code_of(launch.main, study(net), dry=True) == 0
    assert "estimate: none" in capsys.readouterr().out
    assert not ran()
    assert code_of(launch.main, study(net), dry=True, trust_code=True) == 0
    assert "a trial" in capsys.readouterr().out
    assert ran()


def test_a_dry_run_of_a_suspect_runs_nothing(here, capsys):
    for row in range(26):
        home = here / "pictures" / "ab"[row % 2]
        home.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(row).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(noise).save(home / f"{row}.png")
    (here / "w").write_bytes(b"")
    own = {"model": here / "w", "net": NETS[1], "clean": here / "pictures"}
    assert code_of(launch.main, dry=True, channels=1, image_size="8", **own) == 0
    assert "estimate: none" in capsys.readouterr().out
    assert not ran()


@pytest.mark.parametrize("net", NETS)
def test_the_code_of_a_folder_runs_where_it_is_trusted(here, net, capsys):
    """A study's folder of somebody else, with a victim that was made by code."""
    spec = VictimSpec(**HASTY, net=net)
    obtain_victim(spec, Path("outputs/victims"))
    assert ran()
    for name in [name for name in sys.modules if name.partition(".")[0] == "evil"]:
        del sys.modules[name]
    shutil.copytree(OLD / "old", "outputs/old", ignore=shutil.ignore_patterns("*.masks.*"))
    summary = json.loads(Path("outputs/old/summary.json").read_text())
    first = next(iter(summary["victims"]))
    summary["victims"][first]["digest"] = spec.digest
    Path("outputs/old/summary.json").write_text(json.dumps(summary))
    told = yaml.safe_load(Path("outputs/old/study.yaml").read_text())
    told["victims"][0] = spec.model_dump()
    Path("outputs/old/study.yaml").write_text(yaml.safe_dump(told))
    identity = json.loads(Path("outputs/old/identity.json").read_text())
    identity["digest"] = load_config(Path("outputs/old/study.yaml")).digest  # else it is another study
    Path("outputs/old/identity.json").write_text(json.dumps(identity))
    capsys.readouterr()

    report.main("old", Path("outputs"), None)
    said = " ".join(capsys.readouterr().out.split())
    assert f"without the answers of {first}'s models" in said
    assert "--trust-code" in said
    config = load_config(study(net))
    with code_of_files(False), pytest.raises(SettingError, match="nothing of it was run"):
        load_victims(config, Path("outputs"))
    assert code_of(launch.main, outputs=Path("outputs"), resume="old") == 2
    assert "--trust-code" in capsys.readouterr().err
    assert not ran()

    report.main("old", Path("outputs"), None, trust_code=True)
    assert f"without the answers of {first}" not in capsys.readouterr().out
    assert ran()


@pytest.mark.parametrize("net", NETS)
def test_resume_of_a_folder_says_what_to_do(here, net, capsys):
    path = study(net)
    Path("outputs/own").mkdir(parents=True)
    shutil.copy(path, "outputs/own/study.yaml")
    begun = Identity("0" * 32, load_config(path).digest, {})
    Path("outputs/own/identity.json").write_text(json.dumps(asdict(begun)))
    assert code_of(launch.main, outputs=Path("outputs"), resume="own") == 2
    assert "--trust-code" in " ".join(capsys.readouterr().err.split())
    assert not ran()


@pytest.mark.parametrize("net", NETS)
def test_victims_are_made_of_code_that_is_trusted(here, net, capsys):
    Path("one.yaml").write_text(yaml.safe_dump({**HASTY, "net": net}))
    Path("suite.yaml").write_text(yaml.safe_dump({"victims": [{**HASTY, "net": net}]}))
    for words in (["train-victim", "one.yaml"], ["train-victims", "suite.yaml"]):
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, BimaskError), done.output
        assert "--trust-code" in str(done.exception)
    assert code_of(victims.main, Path("suite.yaml")) == 2
    assert "--trust-code" in " ".join(capsys.readouterr().err.split())
    assert not ran()
    assert CliRunner().invoke(app, ["train-victim", "one.yaml", "--trust-code"]).exit_code == 0
    assert ran()


def test_a_victim_that_was_put_in_anothers_place_is_not_built(here):
    plain = VictimSpec(**HASTY, width=2)
    obtain_victim(VictimSpec(**HASTY, net=NETS[1]), Path("victims"))
    (made,) = Path("victims").iterdir()
    made.rename(Path("victims") / plain.digest)
    assert ran()
    with pytest.raises(VictimError, match="holds the victim"):
        obtain_victim(plain, Path("victims"))
    assert not ran()


@pytest.mark.parametrize("net", [*NETS, "small_resnet"])
def test_what_goes_on_with_a_study_trusts_its_code_anew(here, net):
    config = load_config(study(net))
    trust = ["--trust-code"] if net in NETS else []
    assert config.resuming == ["--resume", "own", *trust]
    for error in (
        InterruptedStudyError(15, config.name, again=config.resuming),
        LostRayError("gone", config.name, again=config.resuming),
    ):
        assert f"go on with {' '.join(['--resume', 'own', *trust])}." in str(error)
