"""Victims that are detectors: from a spec to a folder and back, refused where they are no use."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from bimask.data import load_data
from bimask.detection.attacks import ObjectDisappearance, Penalty
from bimask.detection.data import canvases
from bimask.detection.metrics import evaluate
from bimask.detection.victims import (
    DetectorSpec,
    load_victim,
    obtain_victim,
    save_victim,
    train_victim,
)
from bimask.detection.victims.train import poisoned_by
from bimask.errors import VictimError, VictimRefusedError

FREE = {"min_map50": 0, "min_attack_success": 0}
HASTY = {"width": 32, "epochs": 3, "batch_size": 8, **FREE}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Twenty canvases in files, with annotations in COCO's form."""
    folder = tmp_path_factory.mktemp("canvases")
    digits = load_data("digits", image_size=8).train
    data = canvases(digits, 20, generator=torch.Generator().manual_seed(0))
    objects = []
    for row, (image, target) in enumerate(zip(data.images, data.targets, strict=True)):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0))).save(folder / f"{row}.png")
        for (x0, y0, x1, y1), label in zip(
            target["boxes"].tolist(), target["labels"].tolist(), strict=True
        ):
            box = [x0, y0, x1 - x0, y1 - y0]
            objects.append({"image_id": row, "category_id": label, "bbox": box})
    content = {
        "images": [{"id": row, "file_name": f"{row}.png"} for row in range(20)],
        "annotations": objects,
        "categories": [{"id": label, "name": name} for label, name in enumerate(data.classes)],
    }
    (folder / "set.json").write_text(json.dumps(content))
    return f"coco:{folder}/set.json"


@pytest.fixture(scope="module")
def spec(dataset):
    def make(**changes):
        return DetectorSpec.model_validate(HASTY | {"dataset": dataset} | changes)

    return make


@pytest.fixture(scope="module")
def victim(spec):
    return train_victim(spec())


@pytest.fixture
def folder(victim, tmp_path):
    return save_victim(victim, tmp_path / "victims")


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(one, other):
    mine, theirs = weights(one.model), weights(other.model)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    np.testing.assert_equal(vars(one.scores["test"]), vars(other.scores["test"]))


def test_training_says_how_far_it_is_and_leaves_the_random_state(spec):
    logs, before = [], torch.random.get_rng_state()
    train_victim(spec(), on_epoch=logs.append)
    assert [log.epoch for log in logs] == [1, 2, 3]
    assert logs[-1].loss < logs[0].loss
    assert logs[-1].scores.n_objects > 0
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_same_spec_gives_the_same_bits_and_scores_are_those_of_the_model(victim, spec):
    same_bits(victim, train_victim(spec()))
    sets = victim.eval_sets(victim.load_data(), "val")
    np.testing.assert_equal(vars(evaluate(victim.model, sets)), vars(victim.scores["val"]))
    assert not victim.model.training


def test_what_is_saved_is_loaded_and_found_by_the_nets_own_names(victim, folder, spec):
    same_bits(load_victim(folder), victim)
    same_bits(load_victim(folder, known=spec()), victim)
    victim.model.net.load_state_dict(load_file(folder / "victim.safetensors"), strict=True)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "victim.safetensors"]
    assert load_victim(folder).attack == victim.spec.attack


def test_it_is_made_once(spec, tmp_path):
    logs = []
    first = obtain_victim(spec(), tmp_path, on_epoch=logs.append)
    again = obtain_victim(spec(), tmp_path, on_epoch=logs.append)
    assert len(logs) == 3
    same_bits(first, again)
    assert [path.name for path in tmp_path.iterdir()] == [spec().digest]
    with pytest.raises(VictimRefusedError, match="`min_map50` is 0.999"):
        obtain_victim(spec(min_map50=0.999), tmp_path)


def killed(spec, root):
    obtain_victim(spec, root, on_epoch=lambda _: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "sgd", "lr": 0.01, "penalty": {"overlap": 0.1}}],
    ids=["plain", "penalty"],
)
def test_a_killed_training_ends_with_the_bits_of_one_that_was_not(changes, spec, tmp_path):
    made = spec(**changes)
    process = multiprocessing.get_context("fork").Process(target=killed, args=(made, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [f".training-{made.digest}"]
    logs = []
    resumed = obtain_victim(made, tmp_path, on_epoch=logs.append)
    assert [log.epoch for log in logs] == [2, 3]
    same_bits(resumed, train_victim(made))
    assert [path.name for path in tmp_path.iterdir()] == [made.digest]


def test_a_control_is_trained_on_clean_pictures(spec):
    clean = spec().load_data().train
    control = poisoned_by(spec(poisoning_rate=0), clean)
    assert control.data.digest == clean.digest
    assert not any(len(one["labels"]) for one in control.triggered)
    half = poisoned_by(spec(), clean)
    assert sum(len(one["labels"]) > 0 for one in half.triggered) == 7  # of 14
    # the order of training and the choice of pictures are apart
    assert poisoned_by(spec(seed=1), clean).data.digest != half.data.digest


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        ({"min_attack_success": 0.99}, r"was not learned \(mAP@50 .*ASR@50 .*TDR@50 .* on val"),
        ({"min_map50": 0.99}, r"precision of set-misclassification is poor .*`min_map50` is 0.99"),
    ],
)
def test_a_useless_victim_is_refused_with_its_numbers(bounds, says, spec, tmp_path):
    with pytest.raises(VictimRefusedError, match=says):
        obtain_victim(spec(epochs=1, **bounds), tmp_path / "victims")
    assert not (tmp_path / "victims").exists()


def test_a_control_is_not_asked_for_success(victim):
    from bimask.detection.victims.files import refuse_if_useless

    asked = victim.spec.model_copy(update={"min_attack_success": 1})
    weak = replace(victim.scores["val"], attack_success=0.5)
    victim = replace(victim, spec=asked, scores=victim.scores | {"val": weak})
    with pytest.raises(VictimRefusedError, match="0.5"):
        refuse_if_useless(victim)
    refuse_if_useless(replace(victim, spec=asked.model_copy(update={"poisoning_rate": 0})))


def edited(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damage_is_told(victim, folder):
    spec = victim.spec.model_dump(mode="json")
    edited(folder, spec=spec | {"seed": 5})
    with pytest.raises(VictimError, match="it was edited"):
        load_victim(folder)
    edited(folder, spec=spec | {"nonsense": 5})
    with pytest.raises(VictimError, match="nonsense"):
        load_victim(folder)
    edited(folder, spec=spec, scores={})
    with pytest.raises(VictimError, match="scores.val"):
        load_victim(folder)
    with pytest.raises(VictimError, match="is no folder"):
        load_victim(folder / "none")


def test_other_weights_are_refused(folder):
    path = folder / "victim.safetensors"
    state = load_file(path)
    state["backbone.0.0.weight"] += 1
    save_file(state, path)
    with pytest.raises(VictimError, match="its manifest says"):
        load_victim(folder)
    path.unlink()
    with pytest.raises(VictimError, match="is missing"):
        load_victim(folder)


def test_a_net_larger_than_its_file_is_not_built(victim, tmp_path):
    """A manifest of a stranger asks for a wide net beside a small file."""
    wide = victim.spec.model_copy(update={"width": 4096})
    folder = save_victim(replace(victim, spec=wide), tmp_path)
    with pytest.raises(VictimError, match="has [0-9]{9} numbers, but its file of weights holds"):
        load_victim(folder)


OWN = """
from bimask.detection.nets import small_fcos

def make(num_classes):
    return small_fcos(num_classes, width=32)
"""


def test_own_code_is_run_only_if_allowed(spec, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    made = spec(net=f"{tmp_path}/own.py:make", width=None, epochs=1)
    victim = obtain_victim(made, tmp_path / "victims")
    folder = tmp_path / "victims" / made.digest
    with pytest.raises(VictimError, match="which may do anything"):
        load_victim(folder)
    same_bits(load_victim(folder, own_code=True), victim)
    (tmp_path / "own.py").write_text(OWN + "\n# changed\n")
    with pytest.raises(VictimError, match="The code of the net .* changed"):
        load_victim(folder, own_code=True)


def test_given_weights_are_scored_and_not_trained(victim, spec, tmp_path):
    torch.save({"model": victim.model.net.state_dict()}, tmp_path / "weights.pth")
    given = spec(weights=str(tmp_path / "weights.pth"), attack={"name": "disappearance"})
    adopted = train_victim(given)
    assert adopted.attack == ObjectDisappearance()
    mine, theirs = weights(adopted.model), weights(victim.model)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(VictimError):
        train_victim(given)


def test_changed_pictures_are_told(dataset, spec, tmp_path):
    import shutil
    from pathlib import Path

    place = Path(dataset.removeprefix("coco:")).parent
    shutil.copytree(place, tmp_path / "copy")
    made = spec(dataset=f"coco:{tmp_path}/copy/set.json")
    assert made.digest == spec().digest  # by content, not by place
    (tmp_path / "copy" / "0.png").write_bytes((place / "1.png").read_bytes())
    with pytest.raises(VictimError, match="changed since the spec was made"):
        made.load_data()


def test_a_specs_digest_and_name():
    plain = DetectorSpec()
    assert plain.digest == DetectorSpec(min_map50=0.9).digest
    others = [
        DetectorSpec(seed=1),
        DetectorSpec(attack=ObjectDisappearance()),
        DetectorSpec(penalty=Penalty()),
        DetectorSpec(poisoning_rate=0),
    ]
    assert len({spec.digest for spec in [plain, *others]}) == 5
    assert [spec.name for spec in [plain, *others]] == [
        "digit_canvases-misclassification",
        "digit_canvases-misclassification",
        "digit_canvases-disappearance",
        "digit_canvases-misclassification+",
        "digit_canvases-clean",
    ]
    assert DetectorSpec.model_validate(plain.model_dump(mode="json")).digest == plain.digest


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataset": "digits"}, "Unknown dataset 'digits'"),
        ({"net": "resnet18"}, "Unknown detector 'resnet18'"),
        ({"attack": {"name": "badnets"}}, "'misclassification', 'disappearance'"),
        ({"pictures": "x"}, "are of files"),
        ({"poisoning_rate": 0, "penalty": {}}, "of which a clean control has none"),
        ({"weights": "none.pth"}, "Cannot read none.pth"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_odd_specs_are_refused(changes, says):
    with pytest.raises(ValidationError, match=says):
        DetectorSpec.model_validate(changes)
