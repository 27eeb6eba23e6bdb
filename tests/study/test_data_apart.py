"""The defender's images are no side door to the attack."""

import pytest

from bimask import build_attack, load_data
from bimask.attacks import Role


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_clean_images_are_poisoned_ones_no_more_often_than_by_chance(seed):
    """With one seed for all, as in a study: about 10 of 100 where 10 % are poisoned."""
    train = load_data("digits").train
    poisoned = build_attack("badnets").poison(train, rate=0.1, seed=seed)
    changed = {train.images[i].numpy().tobytes() for i in poisoned.indices(Role.POISONED)}
    clean = train.clean_subset(10, seed=seed)
    shared = sum(image.numpy().tobytes() in changed for image in clean.images)
    assert shared <= 25
