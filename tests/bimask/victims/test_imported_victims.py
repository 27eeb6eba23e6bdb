"""A folder that `import` wrote is a victim: its stored images in three splits, its scores of two."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from bimask.__main__ import app
from bimask.errors import SettingError, VictimError, VictimRefusedError
from bimask.interop import load_imported, save_imported
from bimask.interop.backdoorbench_writer import clean_positions
from bimask.metrics import evaluate
from bimask.victims import VictimSpec, obtain_victim, open_victim, train_victim
from bimask.victims.imported import assemble
from bimask.victims.stored import shared_out

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def foreign():
    """A victim of ours as if it came from elsewhere: its test images, and the same triggered."""
    ours = train_victim(VictimSpec(image_size=12, width=4, epochs=8))
    sets = ours.eval_sets(ours.spec.load_data(), "test")
    wanted = ours.attack.attack_labels(sets.clean.labels, sets.clean.num_classes)
    return assemble(
        source="backdoorbench",
        net="small_resnet",
        weights=(ours.model, 4),
        dataset="digits",
        clean=sets.clean,
        triggered=sets.triggered,
        clean_index=clean_positions(sets, wanted),
    )


@pytest.fixture
def folder(foreign, tmp_path):
    source = tmp_path / "attack_result.pt"
    source.write_bytes(b"")
    save_imported(foreign, tmp_path / "somebodys", source=source)
    return tmp_path / "somebodys"


def bytes_of(images):
    return [image.numpy().tobytes() for image in images]


def test_every_clean_image_is_in_one_split_and_its_triggered_one_with_it(foreign):
    splits, stored = shared_out(foreign)
    parts = {name: set(bytes_of(getattr(splits, name).images)) for name in SPLITS}
    whole = foreign.sets.clean
    assert sum(len(getattr(splits, name)) for name in SPLITS) == len(whole)
    assert set.union(*parts.values()) == set(bytes_of(whole.images))
    assert not any(parts[a] & parts[b] for a in SPLITS for b in SPLITS if a < b)
    originals = dict(
        zip(
            bytes_of(foreign.sets.triggered.images),
            bytes_of(whole.images[foreign.clean_index]),
            strict=True,
        )
    )
    for name, triggered in stored.items():
        assert all(originals[image] in parts[name] for image in bytes_of(triggered.images))
        counted = getattr(splits, name).labels
        assert torch.equal(triggered.true_labels, counted[counted != 0])  # all of them, in order
        assert 100 < len(triggered.images) < 250
    assert 50 < len(splits.train) < 130


def test_neither_order_nor_company_decides_an_images_split(foreign):
    shuffled = torch.randperm(len(foreign.sets.clean), generator=torch.Generator().manual_seed(0))
    half = shuffled[: len(shuffled) // 2]
    sets = replace(foreign.sets, clean=foreign.sets.clean.subset(half))
    other = replace(foreign, sets=sets, clean_index=None)
    splits, again = shared_out(foreign)[0], shared_out(other)[0]
    for name in SPLITS:
        assert set(bytes_of(getattr(again, name).images)) <= set(bytes_of(getattr(splits, name).images))


def test_without_known_originals_triggered_images_are_in_one_split_at_most(foreign):
    stored = shared_out(replace(foreign, clean_index=None))[1]
    val, test = (set(bytes_of(stored[name].images)) for name in ("val", "test"))
    assert val
    assert test
    assert not val & test


def test_scores_are_those_of_the_model_on_each_split(folder):
    victim = obtain_victim(VictimSpec(imported=str(folder)), folder.parent / "victims")
    model, splits = load_imported(folder).model, victim.spec.load_data()
    for split in ("val", "test"):
        sets = victim.eval_sets(splits, split)
        assert sets.clean is not None
        assert victim.scores[split] == evaluate(model, sets)
        assert victim.scores[split].split == split
        assert victim.scores[split].n_triggered < 300
    assert victim.scores["val"].attack_success > 0.5
    assert not (folder.parent / "victims").exists()
    with pytest.raises(SettingError, match="stored images alone"):
        victim.attack.apply(splits.val.floats())


def test_the_content_decides_the_digest_and_the_folder_is_its_name(folder):
    spec = VictimSpec(imported=str(folder))
    assert spec.name == "somebodys"
    assert (spec.net, spec.width) == ("small_resnet", 4)
    assert VictimSpec.model_validate(json.loads(json.dumps(spec.model_dump()))) == spec
    moved = folder.rename(folder.parent / "moved")
    assert VictimSpec(imported=str(moved)).digest == spec.digest != VictimSpec(width=4).digest
    with pytest.raises(VictimError, match="holds no imported victim"):
        spec.load_data()
    manifest = moved / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    moved.rename(folder)
    with pytest.raises(VictimError, match="changed since the spec was made"):
        spec.load_data()


def test_nothing_but_bounds_stands_beside_an_import(folder):
    with pytest.raises(ValidationError, match="says all but the bounds; leave attack, seed out"):
        VictimSpec(imported=str(folder), attack={"name": "sig"}, seed=1)
    with pytest.raises(ValidationError, match="holds no imported victim .* `python -m bimask import`"):
        VictimSpec(imported=str(folder.parent))
    strict = VictimSpec(imported=str(folder), min_clean_accuracy=1, min_attack_success=0)
    with pytest.raises(VictimRefusedError, match="clean accuracy of somebodys is poor"):
        train_victim(strict)
    assert open_victim(folder).scores["val"].clean_accuracy < 1  # accepted when it was imported


def test_the_commands_take_an_imported_folder(folder, tmp_path):
    settings = {"inner_optimizer": "sign", "step_size": None, "patience": None, "inner_steps": 1}
    settings |= {"initialise_rounds": 1, "minimise_rounds": 1, "select_rounds": 1}
    (tmp_path / "best.yaml").write_text(yaml.safe_dump({"purify": settings, "seed": 0}))
    words = f"--victim {folder} --config {tmp_path / 'best.yaml'} --out {tmp_path / 'cleaned'}"
    words += " --clean-images-per-class 2"
    done = CliRunner().invoke(app, ["purify", *words.split()])
    assert done.exit_code == 0, done.output
    about = json.loads((tmp_path / "cleaned" / "manifest.json").read_text())
    assert about["before"]["split"] == about["after"]["split"] == "test"
    assert about["suspect"]["victim"] == VictimSpec(imported=str(folder)).digest
    done = CliRunner().invoke(app, ["gallery", str(folder), "--out", str(tmp_path / "picture.png")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "picture.png").stat().st_size > 1000
