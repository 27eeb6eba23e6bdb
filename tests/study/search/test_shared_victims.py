"""Victims in a storage that all studies reach: what one study trained, another fetches."""

import io
import json

import pytest
import torch

from bimask.progress import Console
from bimask.victims import VictimSpec, load_victim
from study.pipeline.prepare import prepare_victims
from study.search import SharedVictims
from study.spec.config import StudyConfig, StudyError

SPEC = {
    "dataset": "digits",
    "image_size": 8,
    "net": "small_resnet",
    "width": 2,
    "epochs": 1,
    "attack": {"name": "badnets"},
    "min_clean_accuracy": 0,
    "min_attack_success": 0,
}
DIGEST = VictimSpec(**SPEC).digest


def prepared(root, storage):
    """What a study says of its victim, and its weights."""
    config = StudyConfig(
        name="shared",
        trials=1,
        victims=[SPEC],
        reference_point={"clean_accuracy": 0.1, "attack_success": 1.0},
        space={"mask_lr": {"kind": "float", "low": 0.02, "high": 0.3}},
    )
    console = Console(file=(said := io.StringIO()), width=200)
    (victim,) = prepare_victims(config, root, torch.device("cpu"), console, storage=storage).values()
    return said.getvalue(), victim.model.state_dict()


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_a_victim_that_one_study_trained_is_fetched_by_another(tmp_path, kind):
    storage = str(tmp_path / "all") if kind == "folder" else f"file://{tmp_path}/all/"
    said, weights = prepared(tmp_path / "one", storage)
    assert "(trained)" in said
    again, fetched = prepared(tmp_path / "two", storage)
    assert "(fetched)" in again
    assert all(torch.equal(fetched[name], weights[name]) for name in weights)
    assert "(cached)" in prepared(tmp_path / "two", storage)[0]
    assert "(trained)" in prepared(tmp_path / "three", None)[0]
    assert [folder.name for folder in (tmp_path / "all" / "victims").iterdir()] == [DIGEST]


def test_a_copy_that_was_cut_short_is_none_and_a_damaged_one_is_named(tmp_path):
    prepared(tmp_path / "one", storage := str(tmp_path / "all"))
    shared = tmp_path / "all" / "victims" / DIGEST
    manifest = (shared / "manifest.json").read_text()
    for name in ("victim.safetensors", "manifest.json"):  # what a bucket lets expire, or lacks yet
        (shared / name).unlink()
        assert not SharedVictims(tmp_path / "two", storage).fetch(DIGEST)
    assert "(trained)" in prepared(tmp_path / "two", storage)[0]
    assert load_victim(shared).spec.digest == DIGEST, "the second study has mended it"
    other = json.loads(manifest)
    other["spec"]["seed"] = 5
    (shared / "manifest.json").write_text(json.dumps(other))
    with pytest.raises(StudyError, match=f"The victim digits-badnets: .*{DIGEST}"):
        prepared(tmp_path / "three", storage)


@pytest.mark.parametrize("kind", ["unknown", "a file"])
def test_a_storage_that_cannot_be_used_is_told_in_a_sentence(tmp_path, kind):
    (tmp_path / "file").touch()
    storage = "nowhere://there" if kind == "unknown" else str(tmp_path / "file")
    with pytest.raises(StudyError, match=r"Cannot (read|write) the victim .* with --storage\."):
        prepared(tmp_path / "one", storage)
