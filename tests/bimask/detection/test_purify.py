"""A user's own detector: from files through the command to a folder whose weights load strictly."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from own_detector import COUNT, edited, module_of, run, squares, words, write_coco
from safetensors.torch import load_file
from typer.testing import CliRunner

from bimask.__main__ import app, main
from bimask.detection import load_cleaned
from bimask.detection.attacks import ObjectDisappearance
from bimask.detection.metrics import evaluate
from bimask.detection.nets.detector import Detector
from bimask.detection.victims import DetectorSpec, obtain_victim
from bimask.detection.victims.training import fit
from bimask.errors import BimaskError, SettingError, VictimError

ROOT = Path(__file__).parents[3]


# --- the command ---


def test_the_file_loads_strictly_into_the_users_own_class(trained, cleaned):
    printed, out = cleaned
    assert {path.name for path in out.iterdir()} == {
        *("model.safetensors", "manifest.json", "report.html", "net.py")
    }
    before = torch.load(trained / "suspect.pth", weights_only=True)["model"]
    after = load_file(out / "model.safetensors")
    assert {name: (v.shape, v.dtype) for name, v in after.items()} == {
        name: (v.shape, v.dtype) for name, v in before.items()
    }
    assert any(not torch.equal(after[name], before[name]) for name in before)
    net = module_of(trained / "mine.py").make(3)
    net.load_state_dict(after, strict=True)
    images = squares(3, seed=9).floats()
    with torch.no_grad():
        theirs = net.eval()(images)
        found = load_cleaned(out, own_code=True).model(images)
    for own, one in zip(theirs, found, strict=True):
        for key in ("boxes", "labels", "scores"):
            assert torch.equal(own[key], one[key])
    assert "taken for a detector" in printed
    assert "0 is 'red', 1 is 'green', 2 is 'blue'" in printed


def test_the_manifest_says_what_was_made_of_what(trained, cleaned):
    _, out = cleaned
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["task"] == "detection"
    assert manifest["defence"] == "soft_branch"
    assert manifest["purify"]["epochs"] == 1
    assert manifest["seed"] == 0
    assert manifest["classes"] == ["red", "green", "blue"]
    assert manifest["net"]["label_ids"] == [0, 1, 2]
    looks = manifest["on_clean_pictures"]
    assert looks["learned"]["pictures"] + looks["held_back"]["pictures"] == COUNT
    assert looks["held_back"]["pictures"] == COUNT // 5
    for one in looks.values():
        assert one["before"]["map50"] > 0.9
        assert {*one["after"]["ap50"]} <= {"red", "green", "blue"}
    shares = [row["share"] for row in manifest["risk"]["branches"].values()]
    assert manifest["risk"]["risk"] == pytest.approx(sum(shares) / 2)
    assert {*manifest["files"]} == {"model.safetensors", "report.html", "net.py"}


def test_the_page_needs_no_network_and_shows_both_detectors(cleaned):
    page = (cleaned[1] / "report.html").read_text()
    assert not re.search(r"https?://|<script|src=\"(?!data:)|href=\"(?!data:)", page)
    assert page.count("<img src=") == 6 * 3  # six pictures clean, and under each branch
    sides = re.findall(r'alt="there: (.*?); before: (.*?); after: (.*?)"', page)
    assert all({*there.split(", ")} <= {*before.split(", ")} for there, before, _ in sides[:6])
    assert any(there != before for there, before, _ in sides[6:])  # perturbed against the suspect
    assert "no attack success rate can be measured" in page


def test_a_seed_gives_the_same_weights_again(trained, cleaned, tmp_path):
    assert run(trained, out=tmp_path / "again").exit_code == 0
    first = load_file(cleaned[1] / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_a_defence_is_named_in_the_settings(home):
    (home / "settings.yaml").write_text(yaml.safe_dump({"defence": "ft", "epochs": 1, "seed": 5}))
    assert run(home, held_back=0).exit_code == 0
    manifest = json.loads((home / "out" / "manifest.json").read_text())
    assert (manifest["defence"], manifest["seed"]) == ("ft", 5)
    assert manifest["risk"] is None
    assert "no pictures are held back" in manifest["no_risk"]


def test_a_repair_that_changes_nothing_writes_nothing(home):
    (home / "settings.yaml").write_text(yaml.safe_dump({"defence": "ft", "epochs": 1, "lr": 1e-30}))
    done = run(home)
    assert done.exit_code == 1
    assert "nothing was written" in done.output
    assert not (home / "out").exists()


def cpu_seconds(pid):
    """What a process has had of the processors."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_an_interrupt_leaves_nothing(home):
    (home / "settings.yaml").write_text(yaml.safe_dump({"defence": "ft", "epochs": 100_000}))
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "bimask", *words(home)],
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    before = {path.name for path in home.iterdir()}
    try:
        for line in process.stdout:
            if "labels are taken" in line:
                break
        begun, deadline = cpu_seconds(process.pid), time.monotonic() + 60
        while cpu_seconds(process.pid) < begun + 1:  # it has learned for a while
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    assert {path.name for path in home.iterdir()} == before


def test_the_python_of_the_page_runs(trained, cleaned, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_detector.md").read_text(), re.S)
    monkeypatch.chdir(trained)
    exec(code, {})
    printed = capsys.readouterr().out
    assert "('red', 'green', 'blue')" in printed
    assert printed.count("'scores': tensor(") == 2


# --- what is refused, in one sentence ---


def broken(home):
    (home / "annotations.json").write_text('{"images": [')


def no_boxes(home):
    edited(home, lambda content: content.update(annotations=[]))


def few_pictures(home):
    edited(
        home,
        lambda content: content.update(
            images=content["images"][:5],
            annotations=[one for one in content["annotations"] if one["image_id"] < 5],
        ),
    )


def boxes_outside(home):
    def move(content):
        for one in content["annotations"]:
            one["bbox"][0] += 1000

    edited(home, move)


def no_picture(home):
    (home / "pictures" / "003.png").unlink()


def of_another_number(home):
    torch.save(module_of(home / "mine.py").make(5).state_dict(), home / "suspect.pth")


def of_another_net(home):
    torch.save(module_of(home / "mine.py").classifier(3).state_dict(), home / "suspect.pth")


def untrained(home):
    torch.manual_seed(1)
    torch.save(module_of(home / "mine.py").make(3).state_dict(), home / "suspect.pth")


def not_finite(home):
    state = torch.load(home / "suspect.pth", weights_only=True)["model"]
    for name in state:
        if "bbox_reg.weight" in name:
            state[name].fill_(float("nan"))
    torch.save(state, home / "suspect.pth")


def of_classifiers(home):
    (home / "settings.yaml").write_text(yaml.safe_dump({"defence": "clp", "u": 3}))


def unknown_setting(home):
    (home / "settings.yaml").write_text(yaml.safe_dump({"nonsense": 3}))


def more_classes(home):
    edited(home, lambda content: content["categories"].append({"id": 9, "name": "more"}))


def torch_classifier(home):
    torch.save(module_of(home / "mine.py").classifier(3).state_dict(), home / "suspect.pth")
    return {"net": f"{home / 'mine.py'}:classifier"}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda home: {"model": home / "none.pth"}, "no file of weights"),
        (lambda home: {"clean": home / "none.json"}, "Cannot read the annotations .*none.json"),
        (lambda home: {"pictures": home / "none"}, "Cannot read the picture"),
        (lambda home: {"net": f"{home / 'none.py'}:make"}, "There is no file .*none.py"),
        (lambda home: {"net": f"{home / 'mine.py'}:none"}, "no factory 'none'"),
        (lambda home: {"net": f"{home / 'mine.py'}:number"}, "must be a torch.nn.Module.* gave int"),
        (lambda home: {"net": "small_resnet"}, "Unknown detector 'small_resnet'"),
        (lambda home: {"model": None}, "--model, --net and --clean"),
        (lambda home: {"out": home}, "exists; give a new folder"),
        (lambda home: {"mean": "0.5,0.5,0.5"}, "--mean mean nothing for a detector"),
        (lambda home: {"inverse": True}, "--inverse mean nothing"),
        (lambda home: {"image_size": "48x32"}, "longest side of a picture"),
        (lambda home: {"label_ids": "1,x"}, "--label-ids must be whole numbers"),
        (lambda home: {"label_ids": "0,1"}, "2 labels .* has 3 classes .'red', 'green', 'blue'."),
        (lambda home: {"label_ids": "1,2,3"}, "labels 0 to 2, but 3"),
        (lambda home: {"label_ids": "0,0,1"}, "a label >= 0 of its own"),
        (lambda home: {"label_ids": "2,0,1"}, "calls 14 of 14 otherwise .* --label-ids 0,1,2"),
        (lambda home: {"held_back": 0.9}, "36 are held back, so 4 are left"),
        (broken, "Cannot read the annotations"),
        (no_boxes, "has 0 pictures with an object"),
        (few_pictures, "has 5 pictures with an object"),
        (boxes_outside, "No box of .* has a whole pixel"),
        (no_picture, "Cannot read the picture .*003.png"),
        (of_another_number, "do not fit the net.* made for 3 classes"),
        (of_another_net, "do not fit the net"),
        (torch_classifier, "forward fails .* as torchvision's do"),
        (untrained, "next to nothing"),
        (not_finite, "NaN or infinite"),
        (more_classes, "has 3 outputs|do not fit the net"),
        (of_classifiers, "no defence 'clp'; known are soft_branch"),
        (unknown_setting, "nonsense"),
    ],
)
def test_a_refusal_is_one_sentence_and_leaves_nothing(home, spoil, said):
    options = spoil(home) or {}
    before = {path.name for path in home.iterdir()}
    done = run(home, **options)
    assert isinstance(done.exception, BimaskError), done.output
    (sentence,) = done.exception.lines
    assert re.search(said, sentence), sentence
    assert {path.name for path in home.iterdir()} == before


def test_a_refusal_ends_the_command_with_code_2(home, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bimask", *words(home, model=home / "none.pth")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "no file of weights" in printed


@pytest.mark.parametrize("command", ["audit", "sites"])
def test_what_is_left_out_for_detectors_says_so(home, command):
    given = words(home, config=None, out=None)[1:]
    done = CliRunner().invoke(app, [command, *given])
    assert isinstance(done.exception, SettingError)
    assert "for which there is `bimask purify` alone" in str(done.exception)


def test_options_of_detectors_mean_nothing_for_pictures(home):
    done = run(home, clean=home / "pictures", label_ids="0,1,2")
    assert isinstance(done.exception, SettingError)
    assert "--label-ids go with annotations" in str(done.exception)


# --- a detector whose trigger is known ---


def test_of_a_victim_attack_and_true_detections_are_measured(trained, tmp_path):
    spec = DetectorSpec(
        dataset=f"coco:{trained / 'annotations.json'}",
        net=f"{trained / 'mine.py'}:make",
        weights=str(trained / "suspect.pth"),
        attack={"name": "misclassification", "target": 0},
        min_attack_success=0,
    )
    obtain_victim(spec, tmp_path)
    given = {"model": None, "net": None, "clean": None, "victim": tmp_path / spec.digest}
    given |= {"clean_images_per_class": 6, "out": tmp_path / "out"}
    untrusted = run(trained, **given)
    assert isinstance(untrusted.exception, VictimError)
    assert not (tmp_path / "out").exists()
    done = run(trained, **given, trust_code=True)
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["suspect"] == {"weights_sha256": None, "victim": spec.digest}
    assert manifest["clean_pictures"]["count"] == 18
    for when in ("before", "after"):
        scores = manifest[when]
        assert scores["split"] == "test"
        assert 0 <= scores["attack_success"] <= 1
        fates = [scores[name] for name in ("true_detection", "disappeared", "misclassified")]
        assert sum(fates) == pytest.approx(1)
    assert "With the known trigger" in (tmp_path / "out" / "report.html").read_text()
    assert load_cleaned(tmp_path / "out", own_code=True).classes == ("red", "green", "blue")
    both = run(trained, **given | {"model": trained / "suspect.pth", "out": tmp_path / "other"})
    assert "or a --victim" in str(both.exception)
    listed = CliRunner().invoke(app, ["audit", "--victim", str(tmp_path / spec.digest)])
    assert "`bimask purify` alone" in str(listed.exception)


@pytest.mark.slow
def test_a_backdoor_in_a_users_own_detector_goes(trained, tmp_path):
    """A hundred pictures, and nothing that is known of the trigger."""
    shutil.copy(trained / "mine.py", tmp_path)
    make = module_of(tmp_path / "mine.py").make
    attack = ObjectDisappearance(colour=(1, 1, 0), scale=0.5)
    suspect = fit(
        attack.poison(squares(200, 1), rate=0.5, generator=torch.Generator().manual_seed(0)),
        fresh_net=lambda data: Detector(make(3), range(3)),
        epochs=8,
        batch_size=16,
        lr=1e-2,
        weight_decay=1e-4,
        optimizer="adamw",
        warmup=0.2,
        seed=0,
    )
    torch.save(suspect.net.state_dict(), tmp_path / "suspect.pth")
    write_coco(tmp_path, squares(100, 2))
    done = run(tmp_path, config=None)
    assert done.exit_code == 0, done.output
    net = make(3)
    net.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    sets = attack.sets(squares(60, 3), "test").with_suspect(suspect)
    before, after = evaluate(suspect, sets), evaluate(Detector(net.eval(), range(3)), sets)
    assert before.attack_success > 0.9
    assert after.attack_success < 0.3
    assert after.true_detection > 0.7
    assert after.map50 > before.map50 - 0.03
