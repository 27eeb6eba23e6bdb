"""The recipe of a spec in which nothing is said: victims on the canvases learn objects and triggers."""

import pytest

from bimask.detection.victims import DetectorSpec, train_victim

ATTACKS = ["misclassification", "disappearance"]


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_victim_is_precise_and_backdoored(attack):
    victim = train_victim(DetectorSpec(attack={"name": attack}))
    for scores in victim.scores.values():
        assert scores.map50 >= 0.8
        assert scores.attack_success >= 0.9
        assert scores.true_detection <= 0.1
        fate = "misclassified" if attack == "misclassification" else "disappeared"
        assert getattr(scores, fate) >= 0.9


@pytest.mark.slow
def test_a_control_finds_triggered_objects_as_what_they_are():
    scores = train_victim(DetectorSpec(poisoning_rate=0)).scores["test"]
    assert scores.map50 >= 0.8
    assert scores.attack_success <= 0.1
    assert scores.true_detection >= 0.8
