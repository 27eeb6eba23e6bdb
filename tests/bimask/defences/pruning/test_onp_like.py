import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.pruning.onp_graph import (
    Graph,
    edges,
    graphs_of,
    normalised,
    strengths,
    structure_of,
)
from bimask.defences.pruning.onp_like import OnpLike, OnpLikeConfig, answers
from bimask.defences.pruning.onp_policies import (
    ByLipschitz,
    Learned,
    PerLayer,
    Random,
    advantages,
    score_function,
)
from bimask.defences.pruning.onp_reward import Reward
from bimask.errors import ModelError
from bimask.masking.frozen import FrozenNet
from bimask.masking.masks import MaskSet
from bimask.nets.residual import PreActResNet18, SmallResNet


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ran(net, clean, seed=0, **settings):
    (result,) = OnpLike().run(net, clean, [OnpLikeConfig(**settings)], generators=[seeded(seed)])
    return result


def test_strengths_cosines_edges_and_normalisation_by_hand():
    """Filters (1, 0), (3, 4), (0, 2): cosines 0.6, 0 and 0.8."""
    weight = torch.tensor([[1.0, 0.0], [-3.0, 4.0], [0.0, -2.0]])[..., None, None]
    strength = strengths(weight)
    assert strength.tolist() == [[1, 0], [3, 4], [0, 2]]
    joined = edges(strength, 0.5)  # the median of 0, 0, 0.6, 0.6, 0.8, 0.8 is 0.6
    assert joined.tolist() == [[False, False, False], [False, False, True], [False, True, False]]
    assert edges(strength, 0.2).tolist() == [
        [False, True, False],
        [True, False, True],
        [False, True, False],
    ]
    expected = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]])
    torch.testing.assert_close(normalised(joined), expected)


def test_a_strength_is_a_sum_over_the_kernel():
    weight = torch.tensor([[[[1.0, -2.0], [0.5, 0.0]]]])
    assert strengths(weight).item() == 3.5


def test_filters_of_one_input_are_not_joined():
    assert not edges(torch.rand(5, 1), 0.5).any()
    assert not edges(torch.rand(1, 4), 0.5).any()


def graph(count=6, inputs=4, seed=0):
    generator = seeded(seed)
    joined = torch.rand(count, count, generator=generator) > 0.6
    joined = (joined | joined.T) & ~torch.eye(count, dtype=torch.bool)
    features = torch.randn(count, inputs, generator=generator)
    return Graph(normalised(joined), features, torch.randn(count, generator=generator))


def learned(graphs, **settings):
    defaults = {"joined": True, "bias": -4.0, "lr": 0.01, "entropy": 0.01, "generator": seeded()}
    return Learned(graphs, **defaults | settings)


def test_permuted_filters_have_permuted_logits():
    one = graph()
    policy = learned([one])
    with torch.no_grad():
        policy.last.normal_(generator=seeded(1))
    order = torch.randperm(6, generator=seeded(2))
    plain = policy.of(one.adjacency, one.features)
    permuted = policy.of(one.adjacency[order][:, order], one.features[order])
    torch.testing.assert_close(permuted, plain[order], atol=1e-6, rtol=0)
    alone = learned([one], joined=False)
    alone.load_state_dict(policy.state_dict())
    assert not torch.allclose(alone.of(one.adjacency, one.features), plain, atol=1e-3)


def test_every_node_is_pruned_alike_in_the_beginning():
    chances = learned([graph(), graph(3, seed=1)]).probabilities()
    torch.testing.assert_close(chances, torch.full((9,), 1 / (1 + math.exp(4))))


def test_the_score_functions_gradient_is_that_of_enumeration():
    """A bandit of two nodes: sum over the four masks of p R grad log p, and its estimate from draws."""
    logits = torch.tensor([0.3, -0.8], requires_grad=True)
    masks = torch.tensor(list(itertools.product([False, True], repeat=2)))
    worth = torch.tensor([0.5, -1.0, 2.0, 0.1])
    chances = logits.sigmoid()
    each = torch.where(masks, chances, 1 - chances).prod(1)
    (exact,) = torch.autograd.grad((each * worth).sum(), logits)
    generator, steps, k = seeded(), 2500, 8
    drawn = torch.rand(steps, k, 2, generator=generator) < chances.detach()
    rewards = worth[(drawn[..., 0] * 2 + drawn[..., 1]).long()]
    for baseline in (False, True):
        estimates = []
        for one, got in zip(drawn, rewards, strict=True):
            others = (got.sum() - got) / (k - 1) if baseline else 0.0
            (gradient,) = torch.autograd.grad(score_function(logits, one, got - others), logits)
            estimates.append(gradient)
        found = torch.stack(estimates)
        error = found.std(0) / math.sqrt(steps)
        assert ((found.mean(0) - exact).abs() < 3 * error).all(), "the baseline leaves the mean"


def test_an_advantage_is_over_the_mean_of_the_others():
    found = advantages(torch.tensor([1.0, 2.0, 6.0]).double())
    plain = torch.tensor([1 - 4, 2 - 3.5, 6 - 1.5]).double()
    torch.testing.assert_close(found, plain / plain.std(correction=0), atol=1e-5, rtol=0)
    assert advantages(torch.full((4,), 2.0).double()).tolist() == [0] * 4


def test_what_joins_a_stream_is_pruned_together():
    net = SmallResNet(1, 3, width=2).eval()
    structure = structure_of(net, torch.rand(2, 1, 8, 8))
    groups = {tuple(structure.names[i] for i in group) for group in structure.groups}
    blocks = {(f"blocks.{i}.shortcut.0", f"blocks.{i}.conv2") for i in range(3)}
    alone = {("stem.0",), *((f"blocks.{i}.conv1",) for i in range(3))}
    assert {frozenset(g) for g in groups} == {frozenset(g) for g in blocks | alone}
    assert structure.readers["stem.0"] == ("blocks.0.shortcut.0", "blocks.0.conv1") or set(
        structure.readers["stem.0"]
    ) == {"blocks.0.shortcut.0", "blocks.0.conv1"}
    pruned = torch.zeros(structure.count, dtype=torch.bool)
    group = next(i for i, g in enumerate(structure.groups) if len(g) == 2)
    pruned[structure.layers[group].start + 1] = True
    tensors = structure.tensors(pruned)
    assert len(tensors) == 2
    for value in tensors.values():
        assert (value[1] == 0).all()
        assert (value[[0, 2, 3]] != 0).any()


def test_streams_of_a_pre_activation_net_run_through_a_stage():
    net = PreActResNet18(1, 3, width=2).eval()
    structure = structure_of(net, torch.rand(1, 1, 16, 16))
    groups = {frozenset(structure.names[i] for i in group) for group in structure.groups}
    assert frozenset({"conv1", "layer1.0.conv2", "layer1.1.conv2"}) in groups
    assert frozenset({"layer2.0.conv2", "layer2.0.shortcut.0", "layer2.1.conv2"}) in groups
    assert frozenset({"layer3.1.conv1"}) in groups


def parts(net, images, labels, **settings):
    structure = structure_of(net, images)
    frozen = FrozenNet(net, MaskSet(structure.sizes()).like(net), sample=images[:4])
    defaults = {"bait": "shared", "budget": 0.02, "accuracy_weight": 1.0, "followed_weight": 10.0}
    defaults |= {"pruned_weight": 1.0}
    reward = Reward(frozen, net, structure, CleanData(images, labels), **defaults | settings)
    return structure, reward


@pytest.mark.parametrize("bait", ["shared", "triggers"])
def test_a_folded_mask_answers_as_a_masked_pass_and_its_worth_is_by_hand(bait):
    torch.manual_seed(0)
    net = SmallResNet(1, 3, width=4).eval()
    images = torch.rand(20, 1, 8, 8, generator=seeded())
    with torch.no_grad():
        net.linear.weight.mul_(50)
        labels = net(images).argmax(1)
    structure, reward = parts(net, images, labels, bait=bait)
    masks = torch.rand(5, structure.count, generator=seeded(1)) < 0.1
    worth = reward(masks)
    for row, mask in enumerate(masks):
        folded = OnpLike().restore(net, structure.tensors(mask), OnpLikeConfig())
        with torch.no_grad():
            right = (folded(images).argmax(1) == labels).double().mean()
            followed = 0.0
            if len(reward._bait):
                hits = (folded(reward._bait).argmax(1) == reward._answers).double()
                followed = float(hits @ reward._counts)
        assert worth.accuracy[row].item() == pytest.approx(right.item(), abs=0.051)
        assert worth.followed[row].item() == pytest.approx(followed, abs=0.06)
        lost = max(0.0, 1 - worth.accuracy[row].item() - 0.02) / 0.01
        expected = -(lost + 10 * worth.followed[row].item() + mask.double().mean().item())
        assert worth.reward[row].item() == pytest.approx(expected, abs=1e-6)
    assert reward.before == 1.0
    assert reward.followed_before > 0.9 or bait == "triggers"


class Flagged(nn.Module):
    """Three classes by the brightness of three columns; channel 3 alone carries anything bright in the
    corner to class 0."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 8)
        self.fc = nn.Linear(8, 3)
        with torch.no_grad():
            self.conv.bias.zero_()
            for index in (0, 1, 2):
                self.conv.weight[index].zero_()
                self.conv.weight[index, 0, 2:, 2 * index : 2 * index + 2] = 1 / 12
            self.conv.weight[4:] *= 0.01
            self.conv.weight[3].zero_()
            self.conv.weight[3, 0, 0] = 3.0
            self.conv.bias[3] = 0.05  # so that a gradient finds it
            self.fc.weight.zero_()
            self.fc.bias.copy_(torch.tensor([0.0, 0.25, 0.5]))  # errors of its own are others
            for index in (0, 1, 2):
                self.fc.weight[index, index] = 8.0
            self.fc.weight[0, 3] = 8.0

    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).flatten(1))


def flagged(count=45):
    images = torch.rand(count, 1, 8, 8, generator=seeded()) * 0.1
    labels = torch.arange(count) % 3
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 2:, 2 * label : 2 * label + 2] += 0.6
    images[:, :, 0] = 0
    return CleanData(images, labels)


def test_a_planted_channel_is_found_in_nine_of_ten_seeds():
    net, clean = Flagged().eval(), flagged()
    assert (net(clean.images).argmax(1) == clean.labels).all()
    structure, reward = parts(net, clean.images, clean.labels)
    graphs = graphs_of(net, structure, clean.images, quantile=0.9, extended=True)
    every = torch.tensor(list(itertools.product([False, True], repeat=8)))
    table = torch.cat([reward(part).reward for part in every.split(64)])
    places = 2 ** torch.arange(7, -1, -1)
    found = 0
    for seed in range(10):
        generator = seeded(seed)
        policy = learned(graphs, generator=generator, lr=0.02)
        for step in range(160):
            masks = policy.ask(8, generator)
            policy.tell(masks, table[masks.long() @ places], step / 160)
        chances = policy.probabilities()
        others = torch.cat([chances[:3], chances[4:]])
        found += bool(chances[3] > 0.9 and (others[:3] < 0.1).all())
    assert found >= 9


@pytest.mark.parametrize("policy", ["graph", "mlp", "random", "clp", "per_layer"])
def test_every_policy_takes_the_planted_channel_out_and_keeps_accuracy(policy):
    net, clean = Flagged().eval(), flagged()
    result = ran(net, clean, policy=policy, iterations=40, policy_lr=0.03)
    model = result.model()
    triggered = clean.images.clone()
    triggered[:, :, 0] = 1.0
    assert (net(triggered).argmax(1) == 0).all()
    assert (model(clean.images).argmax(1) == clean.labels).float().mean() >= 0.95
    assert (model(triggered).argmax(1) == clean.labels).float().mean() >= 0.95
    assert result.numbers["followed_after"] < result.numbers["followed_before"]
    assert len(result.history) == 40


def test_the_same_seed_gives_the_same_mask_and_leaves_torchs_generator():
    net, clean = Flagged().eval(), flagged()
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    one, other = (ran(net, clean, iterations=5, seed=3) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[k], other.tensors[k]) for k in one.tensors)


def test_accuracy_within_the_budget_costs_nothing_and_more_of_it_costs_more():
    net, clean = Flagged().eval(), flagged(100)
    wrong = clean.labels.clone()
    structure, reward = parts(net, clean.images, wrong, followed_weight=0.0, pruned_weight=0.0)
    reward._budget = 0.4
    one = torch.zeros(structure.count, dtype=torch.bool)
    masks = torch.stack([one] * 4)
    masks[1, 0], masks[2, :2], masks[3, :3] = True, True, True
    worth = reward(masks)
    assert worth.accuracy[0] == 1
    assert worth.reward[0] == 0
    order = worth.accuracy.argsort(descending=True, stable=True)
    assert (worth.reward[order].diff() <= 1e-9).all()
    inside = worth.accuracy >= 0.6
    assert (worth.reward[inside] == 0).all()
    assert (worth.reward[~inside] < 0).all()


def test_masks_to_choose_from_are_of_growing_size():
    policy = ByLipschitz(torch.arange(20.0), 16)
    found = answers(policy, torch.zeros(20, dtype=torch.bool))
    assert found[0].nonzero().flatten().tolist() == [19]
    assert found.sum(1).tolist() == sorted(found.sum(1).tolist())
    assert found[-1].sum() == 10
    first = policy.ask(8, seeded())
    second = policy.ask(8, seeded())
    assert first[0].sum() == 1
    assert second[-1].sum() == 10


def test_random_masks_are_of_every_size():
    sizes = Random(100).ask(200, seeded()).sum(1)
    assert sizes.min() == 1
    assert 40 <= sizes.max() <= 50
    assert (sizes <= 7).float().mean() == pytest.approx(0.5, abs=0.12)


def test_the_evolution_strategy_finds_the_thresholds_of_a_separable_bowl():
    """Layers of evenly spaced values: the reward is best where 30 % and 10 % are pruned."""
    values = [torch.linspace(-3, 3, 101)] * 2
    policy, generator = PerLayer(values, 8, start=0.0), seeded()
    wanted = torch.tensor([0.3, 0.1])
    for _ in range(60):
        masks = policy.ask(8, generator)
        shares = masks.view(8, 2, 101).double().mean(2)
        policy.tell(masks, -(shares - wanted).square().sum(1), 0.0)
    shares = policy._mask(policy.get_buffer("mean")).view(2, 101).float().mean(1)
    torch.testing.assert_close(shares, wanted, atol=0.05, rtol=0)


def test_features_are_standardised_and_the_strict_ones_are_two():
    torch.manual_seed(0)
    net = SmallResNet(1, 3, width=4).eval()
    images = torch.rand(6, 1, 8, 8)
    structure = structure_of(net, images)
    strict = graphs_of(net, structure, images, quantile=0.9, extended=False)
    extended = graphs_of(net, structure, images, quantile=0.9, extended=True)
    assert strict[0].features.shape[1] == 2
    assert extended[0].features.shape[1] == 8
    assert extended[0].features[:, -1].unique().tolist() == [0]
    assert extended[-1].features[:, -1].unique().tolist() == [1]
    for one in extended:
        torch.testing.assert_close(one.features[:, :-1].mean(0), torch.zeros(7), atol=1e-5, rtol=0)
        assert ((one.features[:, :-1].std(0, correction=0) - 1).abs() < 1e-4).sum() >= 5


def test_a_net_without_convolutions_is_refused_with_what_to_do():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with pytest.raises(ModelError, match="take another defence"):
        OnpLike().check(net, torch.rand(4, 1, 8, 8))
