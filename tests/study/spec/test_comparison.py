import pytest
import yaml
from pydantic import ValidationError

from bimask.defences import DEFENCES
from bimask.defences.ims.config import PurifyConfig
from study.launch import SPACES
from study.pipeline.judging import judging_study
from study.pipeline.prepare import check_images
from study.spec.comparison import ABLATIONS, ComparisonConfig, load_comparison
from study.spec.config import StudyError
from study.store.comparison import begin, reopen

SMALL = {
    "name": "small",
    "defences": ["clp", "ims"],
    "search_seconds": 30,
    "common": {"dataset": "digits", "net": "small_resnet", "width": 4, "epochs": 2},
    "tuning": [{"attack": {"name": "badnets"}}],
    "held_out": [{"attack": {"name": "blended"}}],
}


def config(**changes):
    return ComparisonConfig.model_validate(SMALL | changes)


def test_no_victim_is_both_tuned_on_and_judged_on():
    found = config()
    seen = {spec.digest for spec in found.study_of(found.entries()[0]).suite}
    judged = {part: {spec.digest for spec in specs} for part, specs in found.judged().items()}
    assert {part: len(digests) for part, digests in judged.items()} == {
        "unseen_seed": 3,
        "held_out": 3,
        "control": 3,
    }
    assert len(seen) == 2
    assert all(seen.isdisjoint(digests) for digests in judged.values())


def test_other_budgets_are_judged_on_the_seeds_that_are_said():
    seeds = {"tuning": [0], "judged": [1, 2, 3], "other_budgets": [2]}
    found = config(seeds=seeds, budgets=[2, 10], clean_images_per_class=10)
    assert [spec.seed for spec in found.judged(2)["control"]] == [2]
    assert found.judged(10) == found.judged()
    assert [spec.seed for spec in found.judged()["control"]] == [1, 2, 3]
    with pytest.raises(ValidationError, match="other_budgets are seeds of `judged`, got 4"):
        config(seeds=seeds | {"other_budgets": [4]})


def test_every_defence_of_the_registry_has_a_study_of_equal_seconds():
    found = config(defences="all")
    studies = [found.study_of(entry) for entry in found.entries()]
    assert [study.defence for study in studies] == list(DEFENCES)
    assert {study.search_seconds for study in studies} == {30}
    assert len({tuple(spec.digest for spec in study.victims) for study in studies}) == 1


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_holds_its_settings_out_of_the_search(name):
    found = config(defences=["ims"], ablations=[name])
    study = found.study_of(found.entries()[1])
    assert study.name == f"small.ims-{name}"
    for setting, value in ABLATIONS[name].items():
        assert setting not in study.space
        assert getattr(study.defence_config({}), setting) == value


def test_own_settings_are_of_a_defence_alone():
    own = {"ims": {"fixed": {"profile": "fast"}, "paper_defaults": False}}
    clp, ims = (config(settings=own).study_of(entry) for entry in config().entries())
    assert (clp.paper_defaults, ims.paper_defaults) == (True, False)
    assert (clp.fixed, ims.fixed["loss_form"]) == ({}, "log")


BAD = {
    "seeds": ({"seeds": {"tuning": [0, 1], "judged": [1]}}, "1 is both"),
    "defence": ({"defences": ["magic"]}, "no defence 'magic'; known are ims"),
    "ablation": ({"ablations": ["heart"]}, "no ablation 'heart'; known are no_selection"),
    "profile": ({"profiles": {"ims": ["quick"]}}, "profile.*paper, fast, robust"),
    "profile of none": ({"profiles": {"clp": ["fast"]}}, "profile"),
    "twice": ({"defences": ["clp", "clp"]}, "named once"),
    "budgets": ({"budgets": [10, 2]}, "whole numbers that rise"),
    "key": ({"secs": 3}, "secs"),
    "attack": ({"held_out": [{"attack": {"name": "no"}}]}, "attack"),
    "same": ({"tuning": [{}, {}]}, "listed twice"),
    "in both": ({"held_out": [{"attack": {"name": "badnets"}}]}, "listed twice"),
    "clean": ({"held_out": [{"poisoning_rate": 0, "epochs": 3}]}, "an attack poisons"),
    "nothing": ({"defences": []}, "nothing to compare"),
    "setting": ({"settings": {"clp": {"fixed": {"v": 1}}}}, "v"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_comparisons_are_refused_in_a_sentence(case, tmp_path):
    changes, words = BAD[case]
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes))
    with pytest.raises(StudyError, match=words) as refused:
        load_comparison(path)
    assert str(path) in str(refused.value)


def test_a_resolved_comparison_reads_back_as_itself(tmp_path):
    found = config(ablations=["no_select"])
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump(found.model_dump(mode="json")))
    assert load_comparison(path) == found
    assert load_comparison(path, {"concurrency": 1}).digest == found.digest
    assert load_comparison(path, {"search_seconds": 31}).digest != found.digest


def test_a_comparison_that_is_begun_is_found_again_with_all_its_rows(tmp_path):
    found = config(
        defences="all", published=["clp"], profiles={"ims": ["robust"]}, ablations=["no_select"]
    )
    begin(tmp_path / "small", found)
    again, _ = reopen(tmp_path, "small", None, {})
    assert again.entries() == found.entries()
    assert again.names == list(DEFENCES)


def test_published_settings_are_a_row_that_nothing_is_searched_for():
    found = config(published=["ims"], settings={"ims": {"fixed": {"mask_lr": 0.3}}})
    row = found.entries()[-1]
    assert (row.name, row.tuned) == ("ims-published", False)
    assert found.settings_of(row, {}) == PurifyConfig()
    assert config(published=["clp"]).digest != config().digest == config(published=[]).digest


def test_a_profile_is_a_row_beside_the_defence_as_it_is_set():
    own = {"ims": {"fixed": {"profile": "fast"}, "paper_defaults": False}}
    found = config(settings=own, profiles={"ims": ["robust"]})
    (row,) = [entry for entry in found.entries() if entry.name == "ims-robust"]
    plain, robust = (found.study_of(entry) for entry in (found.entries()[1], row))
    assert found.entries()[1].name == "ims"
    assert list(plain.space) == list(robust.space)
    assert "class_triggers" not in plain.fixed
    assert robust.fixed["class_triggers"] == 0.8
    assert robust.start == [{n: getattr(PurifyConfig.profile("robust"), n) for n in robust.space}]
    assert found.digest != config(settings=own).digest == config(settings=own, profiles={}).digest


def test_variants_of_the_tuning_attacks_are_judged_beside_their_unseen_seeds():
    found = config(variants=[{"poisoning_rate": 0.01}])
    rates = [spec.poisoning_rate for spec in found.judged()["unseen_seed"]]
    assert rates == [0.1] * 3 + [0.01] * 3
    seen = {spec.digest for spec in found.study_of(found.entries()[0]).suite}
    assert seen.isdisjoint(spec.digest for spec in found.judged()["unseen_seed"])


def test_a_study_without_the_published_settings_begins_with_its_profile():
    own = {"ims": {"fixed": {"profile": "fast"}, "paper_defaults": False}}
    found = config(settings=own, ablations=["no_inner_problem"])
    by_name = {entry.name: found.study_of(entry) for entry in found.entries()}
    profile = PurifyConfig.profile("fast")
    (point,) = by_name["ims"].start
    assert point == {name: getattr(profile, name) for name in by_name["ims"].space}
    (point,) = by_name["ims-no_inner_problem"].start
    assert "budget" not in point
    assert point["mask_lr"] == profile.mask_lr
    assert by_name["clp"].start == [], "its trial 0 is the published settings"


def test_the_shipped_comparison_is_whole():
    found = load_comparison(SPACES / "comparison_digits.yaml")
    assert {entry.defence for entry in found.entries()} == set(DEFENCES)
    assert len(found.held_out) >= 3
    assert len(found.seeds.judged) >= 3
    check_images(judging_study(found))  # every class has as many as the largest budget asks for
