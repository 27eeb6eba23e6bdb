import pytest
import torch
from torch import nn

from bimask.defences.base import CleanData
from bimask.defences.finetuning.ft_sam import FtSam, FtSamConfig
from bimask.defences.held_out import accuracy, split
from bimask.defences.loop import Loop, batches, inside, iterations, shuffled, steps_an_epoch
from bimask.defences.simple import Keeper
from bimask.errors import NonFiniteError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def loop_of(keeper=None, net=None):
    net = nn.Linear(2, 2) if net is None else net
    return Loop(
        FtSam(),
        net,
        FtSamConfig(),
        {"net": net},
        lambda: (net.state_dict(), {}),
        generator=seeded(),
        device=torch.device("cpu"),
        keeper=keeper or Keeper(),
    )


def test_phases_behind_a_run_that_goes_on_are_not_run_again():
    kept, seen = [], []
    with loop_of(Keeper(None, lambda take: kept.append(take()))) as loop:
        for phase, count in (("one", 2), ("two", 3)):
            seen += [(phase, epoch, float(torch.rand(()))) for epoch in loop.epochs(count)]
    assert [k.about["epochs"] for k in kept] == [1, 2, 3, 4, 5]
    for done in range(5):
        again = []
        with loop_of(Keeper(kept[done])) as loop:
            for phase, count in (("one", 2), ("two", 3)):
                again += [(phase, epoch, float(torch.rand(()))) for epoch in loop.epochs(count)]
        assert again == seen[done + 1 :], "and torch's generator stands where it stood"


@pytest.mark.parametrize("count", [1, 3, 7])
def test_iterations_go_on_over_epochs_until_there_were_so_many(count):
    """Nine images are three batches of 3."""
    kept, clean = [], CleanData(torch.arange(9.0).view(9, 1, 1, 1) / 9, torch.arange(9))
    with loop_of(Keeper(None, lambda take: kept.append(take().about["epochs"]))) as loop:
        seen = [(n, labels) for n, _, labels in iterations(loop, count, clean, 3, seeded())]
    assert [number for number, _ in seen] == list(range(count))
    assert kept == list(range(1, -(-count // 3) + 1))
    whole = torch.cat([labels for _, labels in seen][:3])
    assert len(whole.unique()) == len(whole)


def test_the_generator_of_torch_is_put_back():
    loop = loop_of()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with loop:
        torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_loss_or_a_tensor_that_is_not_finite_ends_it():
    net = nn.Linear(2, 2)
    with loop_of(net=net) as loop:
        with pytest.raises(NonFiniteError, match="loss ce is not finite in step 0"):
            loop.step({"ce": float("nan")})
        loop.step({"ce": 1.0, "l1": 0.5})
        assert loop.history[0].loss == 1.5
        with torch.no_grad():
            net.weight[0, 0] = float("inf")
        with pytest.raises(NonFiniteError, match="weight is not finite after step 0"):
            loop.result()


@pytest.mark.parametrize(("count", "size", "sizes"), [(9, 4, [4, 5]), (8, 4, [4, 4]), (1, 4, [1])])
def test_every_image_is_in_one_batch_and_none_is_alone(count, size, sizes):
    parts = shuffled(count, size, seeded())
    assert [len(part) for part in parts] == sizes
    assert steps_an_epoch(count, size) == len(sizes)
    assert torch.cat(parts).sort().values.tolist() == list(range(count))
    images = torch.rand(count, 1, 2, 2)
    clean = CleanData(images, torch.arange(count))
    for seen, labels in batches(clean, size, seeded()):
        assert torch.equal(seen, images[labels])


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.9])
def test_every_class_is_learned_from_and_chosen_by(share):
    labels = torch.tensor([0] * 10 + [1] * 4 + [2] * 2)
    clean = CleanData(torch.arange(16.0).view(16, 1, 1, 1) / 16, labels)
    learn, choose = split(clean, share, seeded())
    assert set(learn.labels.tolist()) == set(choose.labels.tolist()) == {0, 1, 2}
    rows = torch.cat([learn.images, choose.images]).flatten().sort().values
    assert torch.equal(rows, clean.images.flatten()), "no image is in both"
    assert abs(int((choose.labels == 0).sum()) - 10 * share) <= 1


def test_a_class_of_one_image_is_in_both_parts():
    learn, choose = split(CleanData(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])), 0.2, seeded())
    assert learn.labels.tolist() == choose.labels.tolist() == [0, 1]


def test_accuracy_counts_over_batches():
    net = nn.Sequential(nn.Flatten(), nn.Identity())
    images = torch.eye(3).view(3, 3, 1, 1)
    assert accuracy(net, CleanData(images, torch.tensor([0, 1, 0])), batch_size=2) == pytest.approx(
        2 / 3
    )


def test_the_gradient_passes_where_pixels_are_black_or_white():
    images = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5], requires_grad=True)
    found = inside(images)
    assert found.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    (slope,) = torch.autograd.grad(found.sum(), images)
    assert slope.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_looking_on_the_way_costs_a_run_no_passes():
    loop = loop_of()
    loop._ending = lambda: (loop.passes.add(forward=3, backward=0), ({}, {}))[1]
    with loop:
        loop.passes.add(forward=1, backward=1)
        assert loop.result().passes.forward == loop.result().passes.forward == 4
