import math

import pytest
import torch
from torch import nn

from bimask.defences.base import CleanData
from bimask.defences.unlearning import trigger_search
from bimask.defences.unlearning.neural_cleanse import NeuralCleanse, NeuralCleanseConfig
from bimask.defences.unlearning.trigger_search import (
    TriggerSearch,
    anomaly_index,
    as_share,
    search_step,
    stamped,
    success_of,
)
from bimask.errors import ModelError

SHORT = {"search_epochs": 40, "search_batch_size": 8, "epochs": 150, "lr": 0.5}


def searching(classes, shape=(1, 2, 2), cost=1e-3):
    return TriggerSearch(classes, torch.Size(shape), cost, torch.Generator().manual_seed(0))


def masked(search, sizes):
    """The same search with masks of these sums."""
    shares = torch.tensor(sizes).view(-1, 1, 1, 1) / search.mask[0].numel()
    with torch.no_grad():
        search.mask.copy_(torch.atanh(2 * shares - 1).expand_as(search.mask))
    return search


def toy(triggered):
    """Five classes by seven pixels each of 6 x 6; the last pixel leads to class 2 where planted."""
    generator = torch.Generator().manual_seed(3)
    shapes = torch.zeros(5, 36)
    for label in range(5):
        shapes[label, 7 * label : 7 * label + 7] = 1
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.copy_(
            4 * (shapes - shapes.mean(0)) + 0.6 * torch.randn(5, 36, generator=generator)
        )
        net[1].weight[:, 35] = 0
        net[1].weight[2, 35] = 40 if triggered else 0
    images = (shapes.repeat(4, 1) + 0.1 * torch.randn(20, 36, generator=generator)).clamp(0, 1)
    images[:, 35] = 0
    return net, CleanData(images.view(20, 1, 6, 6), torch.arange(20) % 5)


def run(net, clean, **settings):
    config = NeuralCleanseConfig(**{**SHORT, **settings})
    (result,) = NeuralCleanse().run(net, clean, [config], generators=[torch.Generator().manual_seed(0)])
    return result


def test_a_trigger_by_hand():
    """tanh(0) / 2 + 1/2 = 1/2, and tanh(atanh(0.6)) / 2 + 1/2 = 0.8."""
    assert as_share(torch.tensor([0.0, math.atanh(0.6)])).tolist() == pytest.approx([0.5, 0.8])
    image = torch.tensor([[[0.2, 0.4]]])
    found = stamped(image, torch.tensor([[[0.5, 0.0]]]), torch.tensor([[[1.0, 1.0]]]))
    assert found.flatten().tolist() == pytest.approx([0.6, 0.4])


def test_all_classes_begin_alike_and_anywhere_in_0_to_1():
    search = searching(3, (3, 20, 20))
    for start in (as_share(search.mask), as_share(search.pattern)):
        assert torch.equal(start[0], start[1])
        assert start.min() < 0.05
        assert start.max() > 0.95
        assert start.mean().item() == pytest.approx(0.5, abs=0.05)
    assert search.mask.shape == (3, 1, 20, 20)
    assert search.pattern.shape == (3, 3, 20, 20)


def test_the_schedule_of_the_cost_on_a_table():
    """Epochs in which the trigger suffices (1) or not (0), and the cost after each, in thousandths."""
    low = 2**-1.5
    table = [
        ([1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2, 2, 2, 2, 4]),
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, low, low, low, low, low, low**2]),
        ([1, 1, 1, 1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1, 2]),
        ([0, 0, 0, 0, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, low]),
        ([1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 2, 2, 2, 2, 2, 2 * low]),
        ([1, 0, 1, 0, 1, 0, 1, 0, 1, 0], [1] * 10),
    ]
    search = searching(len(table))
    for epoch in range(10):
        success = torch.tensor([0.98 if row[epoch] else 0.97 for row, _ in table])
        search.note(success, 0.98)
        assert (1000 * search.cost).tolist() == pytest.approx([costs[epoch] for _, costs in table])


def test_the_smallest_trigger_that_sufficed_is_kept():
    search = searching(1)
    for size, success, kept in [(2.0, 0.5, math.inf), (3.0, 0.99, 3), (1.0, 0.9, 3), (3.5, 1.0, 3)]:
        masked(search, [size]).note(torch.tensor([success]), 0.98)
        assert search.best.item() == pytest.approx(kept)
    masked(search, [2.0]).note(torch.tensor([1.0]), 0.98)
    assert search.best_mask.sum().item() == pytest.approx(2)
    assert torch.equal(search.best_pattern, as_share(search.pattern))


def test_a_class_ends_where_its_mask_shrinks_no_more_and_its_cost_went_both_ways():
    """The second never went down, the third gains 2 % in the middle, the fourth never sufficed."""
    search = searching(4)
    for epoch in range(5 + 5 + 25):
        masked(search, [2.0, 2.0, 2.0 if epoch < 20 else 1.96, 2.0])
        down = 0.0 if 5 <= epoch < 10 else 1.0
        search.note(torch.tensor([down, 1.0, down, 0.0]), 0.98)
        assert search.going.tolist() == [epoch < 25, True, True, True]
    sizes = search.best.clone()
    masked(search, [0.5] * 4).note(torch.ones(4), 0.98)
    assert search.best[0] == sizes[0], "what has ended is not asked any more"
    assert search.best[1] < sizes[1]


def test_the_anomaly_index_by_hand():
    """Of 1, 10, 11, 12, 14 the median is 11; deviations are 10, 1, 0, 1, 3, and their median is 1."""
    found = anomaly_index(torch.tensor([1.0, 10, 11, 12, 14]))
    assert found.tolist() == pytest.approx([x / 1.4826 for x in (10, 1, 0, 1, 3)])
    even = anomaly_index(torch.tensor([1.0, 2, 4, 9]))  # median 3; deviations 2, 1, 1, 6: median 1.5
    assert even.tolist() == pytest.approx([x / 1.4826 / 1.5 for x in (2, 1, 1, 6)])
    assert anomaly_index(torch.tensor([7.0, 7, 7])).tolist() == [0, 0, 0]


def test_only_what_is_smaller_than_the_others_is_flagged():
    search = searching(5, (1, 4, 4))
    masked(search, [1.0, 10, 11, 12, 14]).note(torch.ones(5), 0.98)
    assert search.flagged(2.0) == [0], "14 is as far away as 2.02, but large"
    assert search.flagged(0.6) == [0, 1]
    assert search.flagged(7.0) == []


def test_a_class_that_no_trigger_leads_to_counts_with_the_whole_image():
    search = searching(5, (1, 4, 4))
    masked(search, [1.0, 10, 11, 12, 2]).note(torch.tensor([1.0, 1, 1, 1, 0.9]), 0.98)
    assert search.best[4] == math.inf
    assert search.flagged(2.0) == [0], "the same as with a mask of 16 pixels"
    assert searching(5).flagged(0.0) == [], "nothing is flagged where nothing was found"


def test_the_loss_of_a_step_by_hand():
    """Two classes with logits (x, 0): of the first CE is log(1 + e^-x), of the second log(1 + e^x)."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0], [0.0]]))
    search = searching(2, (1, 1, 1), cost=0.5)
    with torch.no_grad():
        search.mask.copy_(torch.tensor([math.atanh(0.6), 0.0]).view(2, 1, 1, 1))  # 0.8 and 0.5
        search.pattern.fill_(math.atanh(0.2))  # 0.6
    adam = torch.optim.Adam(search.parameters(), lr=0.1)
    terms = search_step(net.requires_grad_(False), search, adam, torch.zeros(3, 1, 1, 1))
    x = (0.8 * 0.6, 0.5 * 0.6)
    cross_entropy = (math.log(1 + math.exp(-x[0])) + math.log(1 + math.exp(x[1]))) / 2
    assert terms == pytest.approx({"cross_entropy": cross_entropy, "size": 0.5 * (0.8 + 0.5) / 2})


def test_classes_in_one_pass_or_one_by_one_are_the_same(monkeypatch):
    net, clean = toy(triggered=True)
    found = []
    for values in (trigger_search.VALUES, 1):
        monkeypatch.setattr(trigger_search, "VALUES", values)
        search = searching(5, (1, 6, 6))
        adam = torch.optim.Adam(search.parameters(), lr=0.1)
        for _ in range(5):
            terms = search_step(net.requires_grad_(False), search, adam, clean.images)
        success = success_of(net, search, clean.images, batch_size=7)
        found.append([*search.parameters(), torch.tensor(list(terms.values())), success])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_planted_trigger_is_found_shown_and_unlearned():
    net, clean = toy(triggered=True)
    stamp = clean.images.clone()
    stamp[..., 5, 5] = 1
    assert (net(stamp).argmax(1) == 2).all()
    result = run(net, clean)
    assert result.numbers == {"found": 1.0}
    assert 2 in result.tensors["found/classes"].tolist()
    model = result.model()
    assert (model(clean.images).argmax(1) == clean.labels).all()
    assert (model(stamp).argmax(1) == clean.labels).all()
    made = NeuralCleanse().synthesised(net, dict(result.tensors), clean.images, result.config)
    triggered = clean.images + made["each"]
    assert triggered.min() >= 0
    assert triggered.max() <= 1
    assert (net(triggered).argmax(1) == 2).float().mean() >= 0.9
    trigger = made["each"].mean(0)[0]
    assert trigger.argmax() == 35, "it is where the trigger is"


def test_a_clean_model_is_left_as_it_is():
    net, clean = toy(triggered=False)
    result = run(net, clean)
    assert result.numbers == {"found": 0.0}
    assert not result.changed
    assert result.tensors == {}
    assert torch.equal(result.model()(clean.images), net(clean.images))
    assert NeuralCleanse().synthesised(net, {}, clean.images, result.config) == {}
    assert "found" not in [name for step in result.history for name in step.losses]
    assert len(result.history) == 40 * 12 <= result.config.steps(20)


def test_steps_of_the_search_are_ten_an_epoch_at_least():
    config = NeuralCleanseConfig(search_batch_size=32)
    assert config.rounds(100) == (3, 12)
    assert config.rounds(2500) == (1, 79)
    assert config.rounds(3) == (10, 10)
    assert config.steps(100) == 80 * 12 + 100


def test_two_classes_are_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    with pytest.raises(ModelError, match="has 2, of which none can stand apart; take another"):
        NeuralCleanse().check(net, torch.rand(2, 1, 2, 2))
