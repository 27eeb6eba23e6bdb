from types import SimpleNamespace

import pytest
import torch

from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.perturbations import Perturbations, of_images

IMAGES = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def member(row=0, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(row=row, config=PurifyConfig(**changes), generator=generator)


def memory(*members):
    return Perturbations([m.config for m in members], IMAGES)


def test_the_published_settings_start_at_zero_and_draw_nothing():
    paper = member()
    before = paper.generator.get_state()
    start = memory(paper).start([paper], None, IMAGES[None])
    assert start == (None, None, [None])
    assert torch.equal(paper.generator.get_state(), before)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 3), (0.5, 6), (1.0, 12)])
def test_so_many_images_share(share, count):
    one = member(universal=share, warm_start=0.5)
    start = memory(one).start([one], None, IMAGES[None])
    assert (0 if start.shared is None else int(start.shared.sum())) == count
    if count:
        assert start.shared[0, start.leaders[0]].item()


def test_images_that_share_go_by_the_second_number():
    shared = torch.tensor([[True, False], [False, False]]).view(2, 2, 1, 1, 1)
    found = of_images([(0.5, 0.25), (2.0, 4.0)], shared, IMAGES)
    assert torch.equal(found.flatten(1), torch.tensor([[0.25, 0.5], [2.0, 2.0]]))
    assert of_images([(0.5, 0.25), (2.0, 4.0)], None, IMAGES) == [0.5, 2.0]


def test_which_images_share_is_drawn_anew():
    one = member(universal=0.5)
    held = memory(one)
    first, second = (held.start([one], None, IMAGES[None]).shared for _ in range(2))
    assert not torch.equal(first, second)


def test_perturbations_go_on_and_the_universal_one_does_not_touch_the_images_own():
    one = member(universal=0.5, warm_start=1.0)
    held = memory(one)
    batch = torch.tensor([3, 1, 7, 8])
    x = IMAGES[batch][None]
    start = held.start([one], [batch], x)
    assert start.delta.abs().max() == 0
    own = torch.rand(1, 4, 1, 4, 4)
    ended = torch.where(start.shared, torch.full_like(own, 0.5), own)
    held.keep([one], [batch], start, ended)

    everything = held.start([one], None, IMAGES[None])
    shared = everything.shared[0].flatten()
    assert (everything.delta[0, shared] == 0.5).all()
    alone = ~start.shared[0].flatten()
    for position, image in enumerate(batch.tolist()):
        if not shared[image]:
            wanted = own[0, position] if alone[position] else torch.zeros(1, 4, 4)
            assert torch.equal(everything.delta[0, image], wanted)
    elsewhere = [i for i in range(12) if i not in batch.tolist() and not shared[i]]
    assert everything.delta[0, elsewhere].abs().max() == 0


def test_a_share_of_no_warm_start_forgets():
    cold, warm = member(row=0, universal=1.0), member(row=1, universal=1.0, warm_start=1.0)
    held, x = memory(cold, warm), IMAGES.expand(2, -1, -1, -1, -1)
    start = held.start([cold, warm], None, x)
    held.keep([cold, warm], None, start, torch.ones_like(x))
    again = held.start([cold, warm], None, x).delta
    assert again[0].abs().max() == 0
    assert (again[1] == 1).all()


def test_members_draw_from_their_own_generators():
    def drawn(*seeds):
        members = [member(row, seed, universal=0.5, warm_start=0.5) for row, seed in enumerate(seeds)]
        x = IMAGES.expand(len(members), -1, -1, -1, -1)
        return memory(*members).start(members, None, x).shared

    assert torch.equal(drawn(1, 2)[1], drawn(2)[0])
    assert not torch.equal(drawn(1)[0], drawn(2)[0])
