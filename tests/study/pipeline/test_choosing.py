"""`defences: all` is those that can work on a study's nets; the others are named with their reason."""

import yaml

from bimask.defences import DEFENCES
from study.pipeline.choosing import accepted
from study.spec.reading import load_config
from study.store.session import Identity, begin, reopen

CONV = {"dataset": "digits", "net": "small_resnet", "width": 4, "attack": {"name": "badnets"}}
STUDY = {
    "name": "everyone",
    "trials": 3,
    "defences": "all",
    "victims": [CONV],
    "reference_point": {"clean_accuracy": 0.5, "attack_success": 1.0},
    "fixed": {"clp": {"u": 2.0}},
    "space": {"clp": {}},
}
VIT = CONV | {"net": "vit_tiny", "width": 16, "image_size": 16}


def config_of(tmp_path, **changes):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes))
    return load_config(path)


def test_one_that_refuses_a_net_is_left_out_and_named_before_any_victim_is_trained(tmp_path):
    said = []
    config = accepted(config_of(tmp_path, victims=[CONV, VIT]), said.append)
    assert "clp" not in config.defences
    assert set(config.defences) < set(DEFENCES)
    assert {"ims", "ft_sam"} <= set(config.defences)
    (reason,) = [one for one in said if "leaves out clp" in one]
    assert "The victim digits-badnets-" in reason
    assert "CLP prunes batch norms" in reason
    assert config.space["defence"].choices == config.defences
    assert not any(key.startswith("clp.") for key in (*config.space, *config.fixed))
    assert all(point["defence"] in config.defences for point in config.start)


def test_who_says_all_goes_on_with_the_study_that_it_was(tmp_path):
    config = accepted(config_of(tmp_path, victims=[CONV, VIT]), lambda _: None)
    (tmp_path / "outputs").mkdir()
    folder = tmp_path / "outputs" / "everyone"
    begin(folder, config, Identity("id", config.digest, {}))
    again, _ = reopen(tmp_path / "outputs", "everyone", None, {})
    assert again == config
    again, _ = reopen(
        *(tmp_path / "outputs", "everyone", tmp_path / "study.yaml", {}),
        understood=lambda one: accepted(one, lambda _: None),
    )
    assert again == config


def test_a_list_is_taken_as_it_is(tmp_path):
    config = config_of(tmp_path, defences=["clp", "ims"], victims=[VIT])
    assert accepted(config, lambda _: None) is config, "the study itself refuses it, with the reason"
