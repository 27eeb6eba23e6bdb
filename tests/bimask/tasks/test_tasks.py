"""A task is one object a process, and its words are those of what it measures."""

import pickle
from dataclasses import fields

import pytest
import torch
from torch import nn

from bimask.data import ImageData
from bimask.detection.metrics import DetectionScores
from bimask.errors import SettingError
from bimask.metrics import CleanSet, Scores
from bimask.tasks import CLASSIFICATION, TASKS, defence_of, task_named
from bimask.tasks.classifiers import GLANCED

SCORES = {"classification": Scores, "detection": DetectionScores}


@pytest.mark.parametrize("task", TASKS.values(), ids=str)
def test_a_task_is_named_in_the_registry_and_sent_by_its_name(task):
    assert task_named(task.name) is TASKS[task.name] is task
    assert pickle.loads(pickle.dumps(task)) is task
    assert len(pickle.dumps(task)) < 200, "its defences went with it"


def test_whatever_names_no_task_is_of_classifiers():
    assert task_named(None) is task_named("none") is task_named(["detection"]) is CLASSIFICATION


@pytest.mark.parametrize("task", TASKS.values(), ids=str)
def test_metrics_are_fields_of_the_scores_and_the_others_are_among_them(task):
    assert set(task.metrics) <= {field.name for field in fields(SCORES[task.name])}
    assert {task.quality, task.recovered, *task.objectives, "attack_success"} <= set(task.metrics)
    assert task.metrics[task.quality].direction == "maximize"
    assert not task.metrics[task.quality].needs_trigger
    assert task.metrics["attack_success"].direction == "minimize"
    assert task.defence in task.defences


@pytest.mark.parametrize("task", TASKS.values(), ids=str)
def test_settings_name_their_defence_over_all_tasks(task):
    for defence in task.defences.values():
        assert defence_of(defence.config()) is defence


def test_settings_of_no_defence_are_refused():
    with pytest.raises(SettingError, match="of no known defence"):
        defence_of(Scores(0.9, 0.1, 0.8, 10, 9, "val"))


def test_a_glance_is_at_some_of_many_images_and_an_evaluation_at_all():
    images = torch.zeros(GLANCED + 500, 1, 2, 2, dtype=torch.uint8)
    many = CleanSet(ImageData(images, torch.zeros(len(images), dtype=torch.long), ("a", "b")), "val")
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    assert CLASSIFICATION.glance(model, many).n_clean == GLANCED
    assert CLASSIFICATION.evaluate(model, many).n_clean == GLANCED + 500


def test_scores_are_told_in_the_order_of_the_metrics():
    scores = Scores(0.9, 0.125, 0.8, 10, 9, "val")
    assert CLASSIFICATION.told(scores) == "ACC 0.900, ASR 0.125, RA 0.800"
    assert CLASSIFICATION.quality_of(scores) == 0.9
    before = Scores(1.0, 1.0, 0.0, 10, 9, "val")
    derived = CLASSIFICATION.derived(scores, before)
    assert derived.keys() == {"arr", "rdr", "der", "rir"}
    assert derived["arr"] == pytest.approx(0.1)
