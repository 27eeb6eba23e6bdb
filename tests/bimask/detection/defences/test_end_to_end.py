"""What the soft branch does to real victims, trained here in minutes."""

import pytest
import torch

from bimask.defences.base import CleanData
from bimask.detection import evaluate
from bimask.detection.defences import DEFENCES
from bimask.detection.victims import DetectorSpec, train_victim


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["misclassification", "disappearance"])
def test_one_configuration_repairs_either_attack_and_fine_tuning_does_not(attack):
    victim = train_victim(DetectorSpec(attack={"name": attack}))
    splits = victim.load_data()
    sets = victim.eval_sets(splits, "test")
    clean = splits.train.clean_subset(15, seed=0)
    data = CleanData(clean.floats(), list(clean.targets))
    before = victim.scores["test"]
    assert before.attack_success >= 0.8

    def after(name, **settings):
        defence = DEFENCES[name]
        (result,) = defence.run(
            victim.model,
            data,
            [defence.config(**settings)],
            generators=[torch.Generator().manual_seed(0)],
        )
        return evaluate(result.model(), sets)

    repaired, tuned = after("soft_branch"), after("ft")
    assert repaired.map50 >= before.map50 - 0.05  # some draws of pictures cost more than 0.03
    assert repaired.attack_success <= before.attack_success / 2
    assert repaired.true_detection >= 0.7
    assert tuned.attack_success > 2 * repaired.attack_success
