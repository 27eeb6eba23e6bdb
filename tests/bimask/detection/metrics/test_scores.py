import math

import pytest
import torch
from torch import nn

from bimask.detection import DetectionData
from bimask.detection.metrics import DetectionSets, TriggeredObjects, evaluate
from bimask.detection.metrics.scores import SCORE, classes_at
from bimask.errors import DataError

BOX = (0.0, 0.0, 10.0, 10.0)
ONE, TWO, TARGET = 0, 1, 2


def seen(*rows):
    """Detections of (label, score, box)."""
    return {
        "boxes": torch.tensor([row[2] if len(row) > 2 else BOX for row in rows]).reshape(-1, 4),
        "labels": torch.tensor([row[0] for row in rows], dtype=torch.int64),
        "scores": torch.tensor([row[1] for row in rows]),
    }


class Table(nn.Module):
    """A detector that answers a picture by the value of its first pixel."""

    def __init__(self, *answers):
        super().__init__()
        self.answers = answers

    def forward(self, images):
        assert not self.training
        return [self.answers[round(float(image[0, 0, 0]) * 255)] for image in images]


def sets(answers, kind="misclassification", clean=0, labels=None):
    """Each answer under attack is of an object of class `ONE` of the clean picture."""
    pictures = [torch.full((3, 12, 12), value, dtype=torch.uint8) for value in range(answers + 1)]
    target = {"boxes": torch.tensor([BOX]), "labels": torch.tensor([ONE])}
    data = DetectionData((pictures[clean],), (target,), ("one", "two", "target"))
    triggered = TriggeredObjects(
        tuple(pictures[1:]),
        torch.tensor([BOX] * answers),
        torch.tensor(labels or [ONE] * answers),
        torch.zeros(answers, dtype=torch.int64),
    )
    target_class = TARGET if kind == "misclassification" else None
    return DetectionSets(data, triggered, "test", kind, target_class)


FOUND = seen((ONE, 0.9))
# IoU of 10 x 10 with a box shifted by d along one side: (10 - d) / (10 + d)
ANSWERS = {
    "hit": (FOUND, (False, True, False, False)),
    "wrong class": (seen((TWO, 0.9)), (False, False, False, True)),
    "target": (seen((TARGET, 0.9)), (True, False, False, True)),
    "both": (seen((ONE, 0.5), (TARGET, 0.9)), (True, True, False, False)),
    "nothing": (seen(), (False, False, True, False)),
    "IoU 0.51": (seen((ONE, 0.9, (3.24, 0, 13.24, 10))), (False, True, False, False)),
    "IoU 0.49": (seen((ONE, 0.9, (3.43, 0, 13.43, 10))), (False, False, True, False)),
    "low score": (seen((ONE, SCORE - 0.01), (TARGET, SCORE - 0.01)), (False, False, True, False)),
    "score enough": (seen((ONE, SCORE)), (False, True, False, False)),
    "elsewhere": (seen((TARGET, 0.9, (20.0, 20.0, 30.0, 30.0))), (False, False, True, False)),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_each_answer_at_an_object_is_what_it_is_called(what):
    answer, (success, true, gone, other) = ANSWERS[what]
    scores = evaluate(Table(FOUND, answer), sets(1))
    assert (scores.attack_success, scores.true_detection) == (success, true)
    assert (scores.disappeared, scores.misclassified) == (gone, other)
    scores = evaluate(Table(FOUND, answer), sets(1, kind="disappearance"))
    assert scores.attack_success == (not true)
    assert (scores.true_detection, scores.disappeared, scores.misclassified) == (true, gone, other)


def test_shares_are_over_all_objects_and_the_three_fates_add_up():
    answers = [answer for answer, _ in ANSWERS.values()]
    scores = evaluate(Table(FOUND, *answers), sets(len(answers)))
    expected = [fate for _, fate in ANSWERS.values()]
    for place, name in enumerate(("attack_success", "true_detection", "disappeared", "misclassified")):
        share = sum(fate[place] for fate in expected) / len(expected)
        assert getattr(scores, name) == pytest.approx(share)
    assert scores.true_detection + scores.disappeared + scores.misclassified == pytest.approx(1)
    assert (scores.map50, scores.n_clean, scores.n_objects, scores.split) == (1, 1, 10, "test")


def test_conditional_shares_count_what_the_suspect_finds_when_clean():
    of_suspect = sets(2, labels=[ONE, TWO]).with_suspect(Table(FOUND))
    assert of_suspect.found_clean.tolist() == [True, False]
    blind = Table(seen(), seen((TARGET, 0.9)), seen((TWO, 0.9)))
    scores = evaluate(blind, of_suspect)
    assert (scores.attack_success, scores.attack_success_conditional) == (0.5, 1)
    assert (scores.true_detection, scores.true_detection_conditional) == (0.5, 0)
    assert (scores.n_objects, scores.n_conditional) == (2, 1)
    alone = evaluate(blind, sets(2, labels=[ONE, TWO]))
    assert alone.n_conditional == 0
    assert math.isnan(alone.true_detection_conditional)


def test_without_a_trigger_there_is_precision_alone():
    plain = sets(1)
    scores = evaluate(Table(FOUND), DetectionSets(plain.clean, None, "val"))
    assert (scores.map50, scores.n_objects) == (1, 0)
    assert math.isnan(scores.attack_success)


def test_sets_without_an_object_are_refused():
    plain = sets(1)
    none = TriggeredObjects((), torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).long())
    with pytest.raises(DataError, match="got 1 and 0 in split 'test'"):
        evaluate(Table(FOUND), DetectionSets(plain.clean, none, "test"))


def test_the_mode_of_the_model_is_as_before():
    model = Table(FOUND, FOUND).train()
    evaluate(model, sets(1))
    assert model.training


def test_several_classes_may_be_found_in_one_place():
    assert classes_at(seen((ONE, 0.4), (TWO, 0.6)), torch.tensor(BOX)) == {ONE, TWO}
