import copy
import json
import os

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from bimask.attacks import ATTACKS
from bimask.data import load_data
from bimask.errors import DataError, VictimError, VictimRefusedError
from bimask.metrics import evaluate
from bimask.victims import VictimSpec, load_victim, obtain_victim, save_victim, train_victim
from bimask.victims.training import fit

GOOD = {"image_size": 12, "width": 8, "epochs": 8}
HASTY = {"image_size": 8, "width": 2, "epochs": 1, "min_clean_accuracy": 0, "min_attack_success": 0}


@pytest.fixture(scope="module")
def trained():
    """A victim, what it said while training, and the random state before and after."""
    logs = []
    before = torch.random.get_rng_state()
    victim = train_victim(VictimSpec(**GOOD), on_epoch=logs.append)
    return victim, logs, before, torch.random.get_rng_state()


@pytest.fixture(scope="module")
def victim(trained):
    return trained[0]


@pytest.fixture
def folder(victim, tmp_path):
    return save_victim(victim, tmp_path / "victims")


def weights_of(victim):
    return weights_of_net(victim.model)


def weights_of_net(net):
    return torch.cat([value.flatten().double() for value in net.state_dict().values()])


# --- training ---


def test_a_victim_is_accurate_and_backdoored(victim):
    for split, scores in victim.scores.items():
        assert scores.split == split
        assert scores.clean_accuracy > 0.9
        assert scores.attack_success > 0.8
        assert scores.recovery < 0.2
        assert scores.n_clean == 450
        assert 400 < scores.n_triggered < 410
    assert not victim.model.training


def test_scores_are_those_of_the_model(victim):
    splits = victim.spec.load_data()
    for split in ("val", "test"):
        sets = victim.eval_sets(splits, split)
        assert len(sets.clean) == len(getattr(splits, split))
        assert evaluate(victim.model, sets) == victim.scores[split]


def test_training_reports_every_epoch_and_leaves_the_random_state(trained):
    _, logs, before, after = trained
    assert [log.epoch for log in logs] == list(range(1, 9))
    assert logs[-1].loss < logs[0].loss
    assert logs[-1].scores == trained[0].scores["val"]
    assert torch.equal(before, after)


def test_normalisation_is_that_of_the_poisoned_training_set(victim):
    spec = victim.spec
    poisoned = spec.build_attack().poison(spec.load_data().train, rate=0.1, seed=0)
    pixels = poisoned.data.floats().double()
    assert victim.model.mean.item() == pytest.approx(pixels.mean().item(), rel=1e-5)
    assert victim.model.std.item() == pytest.approx(pixels.std().item(), rel=1e-5)


def test_the_seed_decides_the_weights():
    torch.manual_seed(1)
    one = train_victim(VictimSpec(**HASTY))
    torch.manual_seed(2)
    same, other = train_victim(VictimSpec(**HASTY)), train_victim(VictimSpec(**HASTY, seed=1))
    assert torch.equal(weights_of(one), weights_of(same))
    assert not torch.equal(weights_of(one), weights_of(other))


def test_the_seed_decides_more_than_who_is_poisoned():
    one, other = (train_victim(VictimSpec(**HASTY, poisoning_rate=1, seed=seed)) for seed in (0, 1))
    assert not torch.equal(weights_of(one), weights_of(other))


@pytest.mark.parametrize(
    "changes",
    [{"flip": True}, {"shift": 0}, {"attack": {"name": "blended"}}, {"precision": "bfloat16"}],
)
def test_the_spec_decides_the_weights(changes, monkeypatch):
    monkeypatch.setattr("bimask.victims.training.fast_bfloat16", lambda _device: True)
    usual, other = train_victim(VictimSpec(**HASTY)), train_victim(VictimSpec(**HASTY | changes))
    assert not torch.equal(weights_of(usual), weights_of(other))


@pytest.fixture(scope="module")
def control():
    """A victim without a backdoor, under the bounds that others have."""
    return train_victim(VictimSpec(**GOOD, poisoning_rate=0))


def test_a_clean_control_is_trained_on_clean_images_and_keeps_its_scores(control, victim):
    spec = control.spec
    assert spec.is_control
    assert not victim.spec.is_control
    assert torch.equal(
        weights_of(control), weights_of_net(fit(spec.load_data().train, **spec.recipe()))
    )
    for split, scores in control.scores.items():
        assert scores.clean_accuracy > 0.9
        assert scores.attack_success < 0.2  # the rate at which a patch passes for a zero
        assert scores.recovery > 0.7
        assert scores.n_triggered == victim.scores[split].n_triggered


def test_a_clean_control_comes_back_from_its_files(control, tmp_path):
    assert control.spec.digest != VictimSpec(**GOOD).digest
    same_victims(control, load_victim(save_victim(control, tmp_path)))


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_a_clean_control_is_the_same_net_whatever_the_trigger(name, hasty):
    usual = train_victim(VictimSpec(**HASTY, poisoning_rate=0))
    other = train_victim(hasty(name, poisoning_rate=0))
    assert torch.equal(weights_of(usual), weights_of(other))


def test_a_control_must_be_accurate_all_the_same():
    with pytest.raises(VictimRefusedError, match="clean accuracy of digits-clean is poor"):
        train_victim(VictimSpec(**HASTY | {"min_clean_accuracy": 1}, poisoning_rate=0))


@pytest.mark.parametrize(
    ("bound", "words"),
    [("min_attack_success", "attack .* not learned"), ("min_clean_accuracy", "clean accuracy .* poor")],
)
def test_a_useless_victim_is_refused_with_its_numbers_and_nothing_is_written(tmp_path, bound, words):
    spec = VictimSpec(**HASTY | {"poisoning_rate": 0.002, bound: 1})
    scores = train_victim(VictimSpec(**HASTY | {"poisoning_rate": 0.002})).scores["val"]
    numbers = f"ACC {scores.clean_accuracy:.3f}, ASR {scores.attack_success:.3f} on val"
    with pytest.raises(VictimRefusedError, match=f"{words}.*{numbers}; `{bound}` is 1"):
        obtain_victim(spec, tmp_path / "victims")
    assert not (tmp_path / "victims").exists() or not any((tmp_path / "victims").iterdir())


# --- files ---


def test_a_saved_victim_answers_as_before(victim, folder):
    loaded = load_victim(folder)
    before, after = victim.model.state_dict(), loaded.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    images = victim.spec.load_data().test.floats()
    same_layout = {"memory_format": torch.channels_last}  # another one rounds otherwise
    with torch.no_grad():
        models = (copy.deepcopy(model).to(**same_layout) for model in (loaded.model, victim.model))
        assert torch.equal(*(model(images) for model in models))
    assert (loaded.spec, loaded.classes, loaded.scores) == (victim.spec, victim.classes, victim.scores)
    assert not loaded.model.training


def test_a_victim_is_in_a_folder_of_its_digest_and_nothing_else(victim, folder):
    assert folder.name == victim.spec.digest
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "victim.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_manifest_says_what_is_in_the_files(victim, folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert VictimSpec(**manifest["spec"]) == victim.spec
    assert manifest["spec_digest"] == victim.spec.digest
    assert manifest["classes"] == list(victim.classes)
    assert manifest["scores"]["test"]["attack_success"] == victim.scores["test"].attack_success


def test_saving_again_replaces_the_old_files(victim, folder):
    (folder / "left-over").write_text("")
    assert save_victim(victim, folder.parent) == folder
    assert not (folder / "left-over").exists()
    load_victim(folder)


def test_the_second_time_nothing_is_trained(tmp_path):
    spec, epochs = VictimSpec(**HASTY), []
    first = obtain_victim(spec, tmp_path, on_epoch=epochs.append)
    assert len(epochs) == 1
    written = {file: os.stat(file).st_mtime_ns for file in tmp_path.rglob("*")}
    second = obtain_victim(spec, tmp_path, on_epoch=epochs.append)
    assert len(epochs) == 1
    assert {file: os.stat(file).st_mtime_ns for file in tmp_path.rglob("*")} == written
    assert torch.equal(weights_of(first), weights_of(second))
    assert first.scores == second.scores


def test_another_spec_is_another_folder(tmp_path):
    for seed in (0, 1):
        obtain_victim(VictimSpec(**HASTY, seed=seed), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_stricter_bound_refuses_a_saved_victim_without_training(victim, folder):
    epochs = []
    strict = VictimSpec(**GOOD, min_clean_accuracy=1)
    assert strict.digest == victim.spec.digest
    with pytest.raises(VictimRefusedError, match="clean accuracy"):
        obtain_victim(strict, folder.parent, on_epoch=epochs.append)
    assert not epochs
    assert obtain_victim(victim.spec, folder.parent, on_epoch=epochs.append).spec == victim.spec
    assert not epochs


def test_a_flipped_byte_is_found_by_the_digest(folder):
    weights = folder / "victim.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(VictimError, match=r"digest of .*victim\.safetensors.* remove "):
        load_victim(folder)


def test_missing_weights_are_named(folder):
    (folder / "victim.safetensors").unlink()
    with pytest.raises(VictimError, match=r"victim\.safetensors is missing"):
        load_victim(folder)


def test_a_missing_manifest_is_named(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(VictimError, match=r"manifest\.json cannot be read"):
        load_victim(folder)


def without(key):
    return lambda m: {name: value for name, value in m.items() if name != key}


# --- the trigger's state ---

STATEFUL = sorted(name for name in ATTACKS if ATTACKS[name].has_state)


@pytest.fixture
def hasty(quick):
    """Attack -> the spec of a victim of a moment; 0.05, since clean-label attacks have few images."""

    def spec(name, **changes):
        attack = {"name": name, **quick(name)}
        return VictimSpec(**HASTY | {"poisoning_rate": 0.05, "attack": attack} | changes)

    return spec


def same_victims(one, other):
    """Weights, triggered images and scores, bit by bit."""
    assert torch.equal(weights_of(one), weights_of(other))
    assert one.scores == other.scores
    test = one.spec.load_data().test
    assert torch.equal(one.attack.triggered(test).images, other.attack.triggered(test).images)


@pytest.mark.parametrize("name", sorted(ATTACKS))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_attack_makes_victims_that_are_the_same_again_and_after_loading(
    name, precision, hasty, tmp_path
):
    victim = train_victim(hasty(name, precision=precision))
    same_victims(victim, train_victim(hasty(name, precision=precision)))
    folder = save_victim(victim, tmp_path)
    loaded = load_victim(folder)
    same_victims(victim, loaded)
    splits = victim.spec.load_data()
    for split in ("val", "test"):
        assert evaluate(loaded.model, loaded.eval_sets(splits, split)) == victim.scores[split]
    files = {file.name for file in folder.iterdir()}
    assert ("trigger.safetensors" in files) == victim.attack.has_state
    assert ("trigger_sha256" in json.loads((folder / "manifest.json").read_text())) == (
        "trigger.safetensors" in files
    )


@pytest.mark.parametrize("name", STATEFUL)
def test_a_damaged_or_missing_trigger_is_refused(name, hasty, tmp_path):
    folder = save_victim(train_victim(hasty(name)), tmp_path)
    trigger = folder / "trigger.safetensors"
    content = bytearray(trigger.read_bytes())
    content[-2] ^= 1
    trigger.write_bytes(content)
    with pytest.raises(VictimError, match=r"digest of .*trigger\.safetensors.* remove "):
        load_victim(folder)
    trigger.unlink()
    with pytest.raises(VictimError, match=r"trigger's state .*safetensors is missing; remove "):
        load_victim(folder)


def test_a_manifest_without_the_triggers_digest_is_refused(hasty, tmp_path):
    folder = save_victim(train_victim(hasty("wanet")), tmp_path)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(without("trigger_sha256")(json.loads(manifest.read_text()))))
    with pytest.raises(VictimError, match="trigger_sha256"):
        load_victim(folder)


def test_a_trigger_of_another_attack_is_refused(hasty, tmp_path):
    folder = save_victim(train_victim(hasty("wanet")), tmp_path)
    other = save_victim(train_victim(hasty("low_frequency")), tmp_path)
    strange = (other / "trigger.safetensors").read_bytes()
    (folder / "trigger.safetensors").write_bytes(strange)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["trigger_sha256"] = json.loads((other / "manifest.json").read_text())["trigger_sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VictimError, match="is of no use: This is not the state of a trigger of WaNet"):
        load_victim(folder)


def test_a_rate_that_cannot_be_is_refused_before_anything_is_trained(hasty, monkeypatch):
    monkeypatch.setattr("bimask.victims.train.fit", None)  # whoever trains, fails otherwise
    with pytest.raises(DataError, match="LabelConsistent can poison 1 to"):
        train_victim(hasty("label_consistent", poisoning_rate=0.5))


@pytest.mark.parametrize(
    ("attack", "digest"),
    [
        ({"name": "badnets"}, "212b461b4ebaa456"),
        ({"name": "blended"}, "2a978d2b914a4d9f"),
        ({"name": "sig"}, "4e8440eede4821bb"),
    ],
)
def test_victims_of_before_are_found_by_their_digest(attack, digest):
    assert VictimSpec(attack=attack).digest == digest


def with_spec(**changes):
    return lambda m: m | {"spec": m["spec"] | changes}


DAMAGES = {
    "no spec": without("spec"),
    "no digest": without("weights_sha256"),
    "no channels": without("in_channels"),
    "no classes": without("classes"),
    "no scores": without("scores"),
    "no scores on val": lambda m: m | {"scores": {"test": m["scores"]["test"]}},
    "half of the scores": lambda m: m | {"scores": {"val": {"clean_accuracy": 1}}},
    "a list": lambda m: [m],
    "unknown net": with_spec(net="resnet999"),
    "unknown key": with_spec(depth=16),
    "another width": with_spec(width=16),
    "other channels": lambda m: m | {"in_channels": 3},
    "fewer classes": lambda m: m | {"classes": m["classes"][1:]},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_manifest_is_refused(folder, damage):
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(damage(json.loads(manifest.read_text()))))
    with pytest.raises(VictimError):
        load_victim(folder)


def test_a_manifest_cut_short_is_refused(folder):
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:200])
    with pytest.raises(VictimError, match=r"manifest\.json cannot be read"):
        load_victim(folder)


# --- specs and devices ---


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "mnist"},
        {"net": "resnet999"},
        {"attack": {"size": 3}},
        {"attack": {"name": "trojan"}},
        {"attack": {"name": "wanet", "strength": 0}},
        {"attack": {"name": "badnets", "alpha": 1}},
        {"attack": {"name": "badnets", "size": 0}},
        {"poisoning_rate": -0.1},
        {"poisoning_rate_of": "classes"},
        {"epochs": 0},
        {"width": 0},
        {"image_size": 2},
        {"lr": 0},
        {"min_attack_success": 1.5},
        {"learning_rate": 0.1},
    ],
    ids=str,
)
def test_specs_that_cannot_be_are_refused_by_the_setting(changes):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        VictimSpec(**changes)


def test_the_digest_is_that_of_everything_but_the_bounds():
    spec = VictimSpec(**GOOD)
    bounds = {"min_clean_accuracy": 0.9, "min_attack_success": 0.1}
    assert VictimSpec(**GOOD, **bounds).digest == spec.digest
    others = [
        {"seed": 1},
        {"lr": 0.2},
        {"attack": {"name": "badnets", "size": 2}},
        {"attack": {"name": "blended"}},
        {"poisoning_rate": 0.2},
        {"poisoning_rate_of": "target_class"},
        {"image_size": 16},
        {"net": "preactresnet18"},
        {"precision": "bfloat16"},
    ]
    digests = {VictimSpec(**GOOD | other).digest for other in others}
    assert len(digests | {spec.digest}) == 1 + len(others)


def test_other_pictures_in_a_folder_make_another_victim(tmp_path):
    root = tmp_path / "victims"
    data = load_data("digits", image_size=8).test
    for row, (image, label) in enumerate(zip(data.images[:60], data.labels[:60] % 2, strict=True)):
        folder = tmp_path / "pictures" / ["even", "odd"][label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{row}.png")
    asked = HASTY | {"dataset": f"imagefolder:{tmp_path / 'pictures'}", "batch_size": 8}
    spec = VictimSpec(**asked)
    first = obtain_victim(spec, root)
    assert first.spec.dataset_sha256
    assert VictimSpec(**first.spec.model_dump()) == spec

    (tmp_path / "pictures" / "odd" / "1.png").rename(tmp_path / "pictures" / "even" / "1.png")
    with pytest.raises(VictimError, match="pictures in .* changed since the spec was made"):
        spec.load_data()
    now = obtain_victim(VictimSpec(**asked), root)
    assert now.spec.digest != first.spec.digest
    assert sorted(path.name for path in root.iterdir()) == sorted((first.spec.digest, now.spec.digest))
    assert load_victim(root / first.spec.digest).spec == first.spec  # it needs no pictures

    manifest = root / now.spec.digest / "manifest.json"
    about = json.loads(manifest.read_text())
    del about["spec"]["dataset_sha256"]  # as they were when only the path counted
    about["spec_digest"] = VictimSpec(**asked, dataset_sha256=None).digest
    manifest.write_text(json.dumps(about))
    assert load_victim(manifest.parent).spec.dataset_sha256 is None
    with pytest.raises(ValidationError, match="`dataset_sha256` is of pictures"):
        VictimSpec(dataset_sha256="0")


def test_the_name_is_for_people():
    assert VictimSpec().name == "digits-badnets"
    spec = VictimSpec(dataset="imagefolder:/some/where/pets", attack={"name": "sig"})
    assert spec.name == "pets-sig"
    assert VictimSpec(poisoning_rate=0).name == "digits-clean"
