"""A study of detectors: its keys, its digest, and what it is told that has no place in it."""

import re
from typing import get_args

import pytest
import yaml

from bimask.detection.victims import DetectorSpec
from bimask.tasks import DETECTION
from study.spec.config import StudyConfig, StudyError
from study.spec.detection import DetectionObjective, DetectionStudy
from study.spec.directions import DIRECTIONS
from study.spec.reading import load_config

GOOD = """
name: detectors
task: detection
trials: 4
victims:
  - attack: {name: misclassification, target: 7}
  - attack: {name: disappearance}
reference_point: {map50: 0.5, attack_success: 1.0}
"""


@pytest.fixture
def read(tmp_path):
    def read_text(text):
        path = tmp_path / "study.yaml"
        path.write_text(text)
        return load_config(path)

    return read_text


def test_a_study_of_detectors_says_so_in_one_word(read):
    config = read(GOOD)
    assert type(config) is DetectionStudy
    assert config.task is DETECTION
    assert config.directions == {"map50": "maximize", "attack_success": "minimize"}
    assert config.reference == {"map50": 0.5, "attack_success": 1.0}
    assert all(type(spec) is DetectorSpec for spec in config.suite)
    assert config.victim_names() == ["digit_canvases-misclassification", "digit_canvases-disappearance"]
    assert config.defence == "soft_branch"
    assert set(config.space) >= {"lr", "radius", "temperature"}
    assert type(config.defence_config({"lr": 0.01})) is DETECTION.defences["soft_branch"].config


def test_it_is_read_back_from_what_it_writes(read):
    config = read(GOOD)
    again = read(yaml.safe_dump(config.model_dump(), sort_keys=False))
    assert again == config
    assert again.digest == config.digest
    assert "task: detection" in yaml.safe_dump(config.model_dump())


def test_the_task_is_a_part_of_the_digest_of_detectors_alone(read):
    config = read(GOOD)
    assert config.model_copy(update={"task": StudyConfig._own_task()}).digest != config.digest


def test_objectives_are_the_metrics_of_the_task(read):
    own = {"pruned_share", "seconds", "risk"}
    assert set(get_args(DetectionObjective)) == set(DETECTION.metrics) | own <= set(DIRECTIONS)


def test_each_objective_needs_a_worst_corner(read):
    with pytest.raises(StudyError, match="a value for the objective true_detection is missing"):
        read(GOOD + "objectives: [map50, true_detection]\n")


def test_blind_selection_searches_by_quality_and_risk(read):
    config = read(GOOD + "selection: blind\n")
    assert config.objectives == ["map50", "risk"]
    with pytest.raises(StudyError, match="may not use true_detection"):
        read(GOOD + "selection: blind\nconstraints: {min_true_detection: 0.5}\n")


def test_constraints_are_of_what_is_measured(read):
    bounds = read(
        GOOD + "constraints: {min_true_detection: 0.5, max_accuracy_drop: 0.03}\n"
    ).constraints
    found = bounds.violations({"true_detection": 0.25, "accuracy_drop": 0.02})
    assert found == pytest.approx({"min_true_detection": 0.25, "max_accuracy_drop": -0.01})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD.replace("map50: 0.5", "clean_accuracy: 0.5"), "unknown key"),
        (GOOD.replace("disappearance", "badnets"), "victims.1"),
        (GOOD.replace("task: detection", "task: segmentation"), "known are classification, detection"),
        (GOOD + "defence: ims_like\n", "there is no defence 'ims_like'; known are soft_branch"),
        (GOOD + "suspect: {model: a, net: b, clean: c}\n", "no detector in doubt"),
        (GOOD + "constraints: {min_recovery: 0.5}\n", "unknown key"),
        (GOOD.replace("victims:", "controls:"), "victims"),
    ],
)
def test_what_has_no_place_in_it_is_named(read, text, expected):
    with pytest.raises(StudyError, match=re.escape(expected)):
        read(text)


def test_settings_of_a_defence_of_detectors_are_checked(read):
    with pytest.raises(StudyError, match=r"space\.u"):
        read(GOOD + "space: {u: {kind: float, low: 1, high: 2}}\n")
    several = read(GOOD + "defences: [soft_branch, ft]\n")
    assert several.defenders.names == ("soft_branch", "ft")
    assert type(several.defence_config({"defence": "ft", "ft.lr": 0.01})) is (
        DETECTION.defences["ft"].config
    )
