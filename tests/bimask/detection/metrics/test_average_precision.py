import math

import pytest
import torch

from bimask.detection.metrics.average_precision import RECALLS, THRESHOLDS, average_precision
from bimask.errors import DataError


def objects(*boxes, labels=None):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
    }


def detections(*boxes, labels=None, scores=None):
    return {**objects(*boxes, labels=labels), "scores": torch.tensor(scores or [1.0] * len(boxes))}


HERE, THERE, FAR = (0, 0, 10, 10), (20, 20, 30, 30), (50, 50, 60, 60)


def test_what_finds_all_is_worth_one_and_what_finds_nothing_none():
    targets = [objects(HERE, THERE, labels=[0, 2]), objects(), objects(FAR, labels=[2])]
    perfect = average_precision(
        [{**target, "scores": torch.rand(len(target["labels"]))} for target in targets], targets
    )
    assert (perfect.map50, perfect.map, perfect.by_class) == (1, 1, {0: 1, 2: 1})
    nothing = average_precision([detections()] * 3, targets)
    assert (nothing.map50, nothing.map, nothing.by_class) == (0, 0, {0: 0, 2: 0})


def test_a_false_detection_above_the_only_object_halves_precision_and_one_below_costs_nothing():
    above = average_precision([detections(FAR, HERE, scores=[0.9, 0.8])], [objects(HERE)])
    below = average_precision([detections(FAR, HERE, scores=[0.7, 0.8])], [objects(HERE)])
    assert above.map50 == pytest.approx(0.5)
    assert below.map50 == 1


def test_half_of_the_objects_are_the_recalls_up_to_a_half():
    half = average_precision([detections(HERE)], [objects(HERE, THERE)])
    assert half.map50 == pytest.approx(51 / 101)


def test_overlap_counts_from_each_threshold_on_and_a_second_finding_is_false():
    shifted = [detections((0, 0, 10, 7))]  # 0.7 of the object
    ap = average_precision(shifted, [objects(HERE)])
    assert ap.map50 == 1
    assert ap.map == pytest.approx(5 / 10)
    twice = average_precision(
        [detections(HERE, HERE, THERE, scores=[0.9, 0.8, 0.7])], [objects(HERE, THERE)]
    )
    assert twice.map50 == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_a_class_without_objects_is_left_out_and_nothing_at_all_is_no_number():
    ap = average_precision([detections(HERE, FAR, labels=[0, 1])], [objects(HERE)])
    assert ap.map50 == 1
    empty = average_precision([detections(HERE)], [objects()])
    assert math.isnan(empty.map50)
    assert math.isnan(empty.map)


def test_of_one_class_in_one_picture_a_hundred_count():
    far = [(100 + 12 * i, 0, 110 + 12 * i, 10) for i in range(100)]
    late = detections(*far, HERE, scores=[0.9] * 100 + [0.1])
    assert average_precision([late], [objects(HERE)]).map50 == 0
    other = detections(*far, HERE, labels=[1] * 100 + [0], scores=[0.9] * 100 + [0.1])
    assert average_precision([other], [objects(HERE)]).map50 == 1


def test_pictures_that_are_not_those_of_the_objects_are_refused():
    with pytest.raises(DataError, match="2 pictures"):
        average_precision([detections()], [objects(HERE)] * 2)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_torchmetrics_says(seed):
    pytest.importorskip("faster_coco_eval")
    torchmetrics = pytest.importorskip("torchmetrics.detection")
    generator = torch.Generator().manual_seed(seed)
    targets, found = [], []
    for _ in range(25):
        count = int(torch.randint(0, 5, (1,), generator=generator))
        corner = 60 * torch.rand(count, 2, generator=generator)
        boxes = torch.cat([corner, corner + 5 + 30 * torch.rand(count, 2, generator=generator)], 1)
        labels = torch.randint(4, (count,), generator=generator)
        noise = torch.randn(3 * count, 4, generator=generator)
        labels_seen = labels.repeat(3)
        wrong = torch.rand(3 * count, generator=generator) < 0.3
        labels_seen[wrong] = torch.randint(5, (int(wrong.sum()),), generator=generator)
        seen = boxes.repeat(3, 1) + 2 * noise
        seen[:, 2:] = torch.maximum(seen[:, 2:], seen[:, :2] + 1)
        scores = torch.randint(1, 20, (3 * count,), generator=generator) / 20  # with ties
        targets.append({"boxes": boxes, "labels": labels})
        found.append({"boxes": seen, "labels": labels_seen, "scores": scores})
    # its own recalls are float32, and 0.3 of them is more than 3 of 10 objects; COCO's are not
    metric = torchmetrics.mean_ap.MeanAveragePrecision(
        iou_thresholds=list(THRESHOLDS), rec_thresholds=RECALLS.tolist(), backend="faster_coco_eval"
    )
    metric.update(found, targets)
    theirs = metric.compute()
    ours = average_precision(found, targets)
    assert 0.1 < ours.map < ours.map50 < 0.9
    assert ours.map50 == pytest.approx(theirs["map_50"].item(), abs=1e-6)
    assert ours.map == pytest.approx(theirs["map"].item(), abs=1e-6)
