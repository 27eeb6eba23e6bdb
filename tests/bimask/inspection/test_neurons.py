import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bimask.inspection.neuron_triggers import Triggers, flip_rates, moved, search_triggers, size_penalty
from bimask.inspection.neurons import Neuron, Stimulator, candidate, find_neurons, spread
from bimask.masking.sites import Site


class Net(nn.Module):
    """Channel 2 of the second convolution, where large, raises logit 3."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)
        self.fc = nn.Linear(5, 4)
        with torch.no_grad():
            self.fc.weight[3, 2] = 20.0

    def forward(self, x):
        hidden = F.relu(self.conv1(x), inplace=True)
        out = self.conv2(hidden)
        out += 0.01 * hidden.mean(1, keepdim=True)
        return self.fc(F.relu(out).mean((2, 3)))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.rand(11, 1, 6, 6, generator=seeded())


def net():
    torch.manual_seed(3)
    return Net().eval()


def shy():
    """Channel 2 is not active on clean images, and bright ones make it."""
    model = net()
    with torch.no_grad():
        model.conv1.weight.abs_()
        model.conv2.weight[2].abs_()
        outputs = model.conv2(F.relu(model.conv1(torch.rand(50, 1, 6, 6, generator=seeded(5)) * 0.5)))
        model.conv2.bias[2] -= outputs[:, 2].max() + 0.3
        model.fc.weight[3, 2] = 200.0
    return model


def by_hand(model, images, name, channel, steps):
    """Elevations of one channel, an image and a value at a time."""
    module = model.get_submodule(name)
    rows = []
    for image in images:
        logits = []
        for value in steps:

            def put(_m, _a, out, value=value):
                out = out.clone()
                out[:, channel] = value
                return out

            handle = module.register_forward_hook(put)
            with torch.no_grad():
                logits.append(model(image[None])[0])
            handle.remove()
        rows.append(torch.stack(logits[1:]).amax(0) - logits[0])
    return torch.stack(rows)


def test_elevations_are_those_of_brute_force_for_every_channel(images, monkeypatch):
    model = net()
    monkeypatch.setattr("bimask.inspection.neurons.PER_PASS", 100)  # two channels a pass, of 3 and 5
    stimulator = Stimulator(model, images)
    assert [site.key for site in stimulator.sites] == ["conv1", "conv2"]
    for site in stimulator.sites:
        steps = [i * 2.0 * stimulator.levels[site.key] / 4 for i in range(4)]
        found = stimulator.elevations(site, 2.0, 4)
        assert found.shape == (site.channels, 11, 4)
        for channel in range(site.channels):
            expected = by_hand(model, images, site.module, channel, steps)
            torch.testing.assert_close(found[channel], expected, atol=1e-5, rtol=1e-4)
    assert not any(m._forward_hooks for m in model.modules())
    assert "forward" not in vars(model.conv1)


def test_the_level_of_a_layer_is_a_high_percentile_of_its_outputs(images):
    model = net()
    outputs = model.conv1(images).detach().flatten().sort().values
    level = Stimulator(model, images).levels["conv1"]
    assert outputs[int(0.99 * len(outputs))] <= level <= outputs[-1]


def test_a_planted_channel_is_ranked_first_with_its_class(images):
    model = net()
    with torch.no_grad():
        model.conv2.weight[2] *= 0.01  # no other neuron drives it
    best = find_neurons(Stimulator(model, images), torch.arange(11) % 4)[0]
    assert (best.site.key, best.channel, best.target) == ("conv2", 2, 3)


def test_images_must_agree_on_the_class_and_some_be_of_another():
    elevations = torch.zeros(10, 3)
    elevations[:, 1] = torch.arange(1, 11) / 10.0
    labels = torch.zeros(10, dtype=torch.long)
    assert candidate(elevations, labels, 0.9) == (1, pytest.approx(0.1))
    assert candidate(elevations, torch.ones(10, dtype=torch.long), 0.9) is None
    labels[0] = 1  # the image with the smallest vote is of that class itself
    assert candidate(elevations, labels, 0.9) == (1, pytest.approx(0.2))
    elevations[:1, 2] = 5
    assert candidate(elevations, labels, 0.9) is not None, "9 of 10"
    elevations[:2, 2] = 5
    assert candidate(elevations, labels, 0.9) is None, "8 of 10"


def test_half_of_the_list_has_three_of_a_layer_at_most():
    def neurons(layer, scores):
        site = Site(layer, layer, "conv", 9)
        return [Neuron(site, i, 0, score, 1.0) for i, score in enumerate(scores)]

    found = neurons("a", [9, 8, 7, 6, 5]) + neurons("b", [4, 3, 2, 1])
    chosen = [(n.site.key, n.score) for n in spread(found, 8)]
    assert chosen == [("a", 9), ("a", 8), ("a", 7), ("a", 6), ("a", 5), ("b", 4), ("b", 3), ("b", 2)]
    chosen = [(n.site.key, n.score) for n in spread(neurons("a", [9, 8, 7, 6]) + neurons("b", [1]), 4)]
    assert chosen == [("a", 9), ("a", 8), ("a", 7), ("a", 6)]


def test_the_size_of_a_trigger_costs_beyond_its_bound_alone():
    size = torch.tensor([0.01, 0.06, 0.09, 0.12], requires_grad=True)
    cost = size_penalty(size, 0.06, 10.0)
    assert cost.tolist() == pytest.approx([0, 0, 5, 10], abs=1e-5)
    (gradient,) = torch.autograd.grad(cost.sum(), size)
    assert gradient[[0, 2, 3]].tolist() == pytest.approx([0, 10 / 0.06, 10 / 0.06])


def test_a_trigger_is_moved_and_what_leaves_the_picture_is_lost():
    maps = torch.arange(9.0).view(1, 1, 3, 3).repeat(3, 1, 1, 1)
    shifted = moved(maps, torch.tensor([[1, 0], [0, -2], [0, 0]]))
    assert shifted[0, 0].tolist() == [[0, 0, 0], [0, 1, 2], [3, 4, 5]]
    assert shifted[1, 0].tolist() == [[2, 0, 0], [5, 0, 0], [8, 0, 0]]
    assert torch.equal(shifted[2], maps[2])


def corner(target=3):
    cover = torch.zeros(1, 1, 6, 6)
    cover[..., :2, :2] = 1
    return Triggers("patch", cover, torch.ones(1, 1, 6, 6), torch.tensor([target]))


def test_flip_rates_are_of_images_of_other_classes():
    class Corner(nn.Module):
        def forward(self, x):
            bright = (x[:, 0, 0, 0] > 0.99).float()
            return torch.stack([0.5 - bright, x[:, 0, 5, 5] * 0, 0 * bright, bright], 1)

    images = torch.rand(4, 1, 6, 6, generator=seeded()) * 0.9
    rates, by_class = flip_rates(Corner(), corner(), images, torch.tensor([0, 0, 1, 3]), 4)
    assert rates.tolist() == [1.0]
    assert by_class.tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("kind", ["patch", "pattern"])
def test_a_trigger_for_a_planted_neuron_leads_images_to_its_class_within_its_size(kind, images):
    model, labels = shy(), torch.arange(11) % 3
    images = images * 0.5
    best = find_neurons(Stimulator(model, images), labels)[:2]
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    made, passes = search_triggers(
        model,
        images,
        labels,
        best,
        kind=kind,
        steps=80,
        lr=0.1,
        most=0.25,
        target_weight=1.0,
        size_weight=10.0,
        generator=seeded(),
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert passes == 80
    shown = made.every(images)
    assert shown.shape == (2, 11, 1, 6, 6)
    assert 0 <= shown.min() <= shown.max() <= 1
    size = made.cover.mean((1, 2, 3)) if kind == "patch" else made.paint.abs().mean((1, 2, 3))
    assert (size <= 0.3).all()
    rates, _ = flip_rates(model, made, 0.5 * torch.rand(9, 1, 6, 6, generator=seeded(1)), labels[:9], 4)
    assert rates[0] >= 0.8
    each = made.each(images, torch.tensor([0, 1] * 5 + [0]))
    torch.testing.assert_close(each[3], shown[1, 3])
