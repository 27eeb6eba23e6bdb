"""How masks are proposed: by a graph network that learns from rewards, or by what it is compared with.

A policy is asked for masks and told what each is worth. What it changes is in its state dict, so that a
run can go on.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.pruning.onp_graph import Graph
from bimask.errors import NonFiniteError

WIDTH = 32
MOST_PRUNED = 0.5  # share of the nodes in a random mask, at most


class Policy(nn.Module):
    """Proposes masks over nodes."""

    @abstractmethod
    def ask(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, nodes) booleans, true where a node is pruned."""

    def tell(self, masks: Tensor, rewards: Tensor, progress: float) -> None:
        """Learn from what masks were worth.

        Args:
            rewards: (count,) float64.
            progress: share of the steps that lie behind, in [0, 1).
        """

    def ranking(self) -> Tensor | None:
        """(nodes,) the higher the sooner pruned; None where the policy has no order."""
        return None

    def probabilities(self) -> Tensor | None:
        """(nodes,) of being pruned; None where the policy has none."""
        return None


class Learned(Policy):
    """h = relu(A X W1), h' = relu(A h W2 + h), logit = w h' + b of every node, and each is pruned or
    not by itself: Bernoulli(sigmoid(logit)). The weights are those of all layers.

    The gradient is that of the score function, with the mean of the other masks' rewards as baseline:

        mean over k of (R_k - mean of the others) grad log p(mask k)  +  entropy grad H

    Advantages are divided by their deviation; the entropy is a mean over nodes, and its weight falls
    to 0 in a straight line.

    Args:
        graphs: of every group.
        joined: whether nodes see their neighbours; without, this is a perceptron (an ablation).
        bias: b in the beginning; w is 0 there.
    """

    def __init__(
        self,
        graphs: Sequence[Graph],
        *,
        joined: bool,
        bias: float,
        lr: float,
        entropy: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        inputs = graphs[0].features.shape[1]
        self._graphs, self._joined, self._entropy = graphs, joined, entropy

        def drawn(rows: int) -> nn.Parameter:
            values = torch.randn(rows, WIDTH, generator=generator)
            return nn.Parameter(values * math.sqrt(2 / rows))

        self.first, self.second = drawn(inputs), drawn(WIDTH)
        self.last = nn.Parameter(torch.zeros(WIDTH))
        self.bias = nn.Parameter(torch.tensor(bias))
        self.adam = torch.optim.Adam(self.parameters(), lr)

    def forward(self) -> Tensor:
        """(nodes,) logits.

        Raises:
            NonFiniteError: one of them is not finite.
        """
        logits = torch.cat([self.of(graph.adjacency, graph.features) for graph in self._graphs])
        if not bool(logits.isfinite().all()):
            raise NonFiniteError("The policy's logits are not finite; lower the learning rate.")
        return logits

    def of(self, adjacency: Tensor, features: Tensor) -> Tensor:
        """Logits (C,) of one graph (C, C) with features (C, F)."""
        if not self._joined:
            adjacency = torch.eye(len(features))
        hidden = (adjacency @ features @ self.first).relu()
        hidden = (adjacency @ hidden @ self.second + hidden).relu()
        return hidden @ self.last + self.bias

    @torch.no_grad()
    def ask(self, count: int, generator: torch.Generator) -> Tensor:
        chances = self().sigmoid().expand(count, -1)
        return torch.rand(chances.shape, generator=generator) < chances

    def tell(self, masks: Tensor, rewards: Tensor, progress: float) -> None:
        logits = self()
        gain = score_function(logits, masks, advantages(rewards).to(logits.dtype))
        chances = logits.sigmoid()
        spread = F.binary_cross_entropy_with_logits(logits, chances)  # entropy, mean over nodes
        self.adam.zero_grad()
        (-gain - (1 - progress) * self._entropy * spread).backward()
        self.adam.step()

    def ranking(self) -> Tensor:
        return self().detach()

    def probabilities(self) -> Tensor:
        return self().detach().sigmoid()


def advantages(rewards: Tensor) -> Tensor:
    """R_k minus the mean of the others, over their deviation: (K,) -> (K,)."""
    others = (rewards.sum() - rewards) / max(1, len(rewards) - 1)
    found = rewards - others
    return found / (found.std(correction=0) + 1e-6)


def score_function(logits: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    """Mean over masks of weight log p(mask), whose gradient is the estimate.

    Args:
        logits: (nodes,); masks: (K, nodes) booleans; weights: (K,).
    """
    each = F.binary_cross_entropy_with_logits(
        logits.expand(len(masks), -1), masks.to(logits.dtype), reduction="none"
    )
    return -(weights * each.sum(1)).mean()


class Random(Policy):
    """Nodes are drawn evenly; how many is drawn evenly on a log scale."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.nodes = nodes

    def ask(self, count: int, generator: torch.Generator) -> Tensor:
        masks = torch.zeros(count, self.nodes, dtype=torch.bool)
        for mask in masks:
            exponent = float(torch.rand((), generator=generator))
            many = max(1, round((MOST_PRUNED * self.nodes) ** exponent))
            mask[torch.randperm(self.nodes, generator=generator)[:many]] = True
        return masks


class ByLipschitz(Policy):
    """CLP's order: those first whose bound stands out of their layer; more of them in each step.

    Args:
        lipschitz: (nodes,), standardised over each layer.
        asked: masks in all.
    """

    def __init__(self, lipschitz: Tensor, asked: int) -> None:
        super().__init__()
        self.register_buffer("order", lipschitz)
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))
        self._asked = asked

    def ask(self, count: int, generator: torch.Generator) -> Tensor:
        order = self.get_buffer("order")
        places = order.argsort(descending=True, stable=True)
        masks = torch.zeros(count, len(order), dtype=torch.bool)
        for row in range(count):
            exponent = min(1.0, (int(self.get_buffer("next")) + row) / max(1, self._asked - 1))
            masks[row, places[: max(1, round((MOST_PRUNED * len(order)) ** exponent))]] = True
        self.get_buffer("next").add_(count)
        return masks

    def ranking(self) -> Tensor:
        return self.get_buffer("order")


class PerLayer(Policy):
    """One threshold a layer on CLP's standardised bounds, by an evolution strategy of our own: the
    separable CMA-ES of Ros and Hansen (PPSN 2008), whose covariance is a diagonal.

    Args:
        lipschitz: (C,) of every layer.
        start: threshold in the beginning: CLP's.
    """

    def __init__(self, lipschitz: Sequence[Tensor], population: int, start: float = 3.0) -> None:
        super().__init__()
        self._values, self._population = list(lipschitz), population
        size = len(self._values)
        parents = max(1, population // 2)
        weights = math.log(parents + 0.5) - torch.arange(1, parents + 1, dtype=torch.float64).log()
        self._weights = weights / weights.sum()
        self._effective = float(1 / self._weights.square().sum())
        for name, value in (
            ("mean", torch.full((size,), start, dtype=torch.float64)),
            ("variance", torch.ones(size, dtype=torch.float64)),
            ("path", torch.zeros(size, dtype=torch.float64)),
            ("step_path", torch.zeros(size, dtype=torch.float64)),
            ("sigma", torch.ones((), dtype=torch.float64)),
            ("asked", torch.zeros(population, size, dtype=torch.float64)),
        ):
            self.register_buffer(name, value)

    def ask(self, count: int, generator: torch.Generator) -> Tensor:
        mean, variance, sigma, asked = map(self.get_buffer, ("mean", "variance", "sigma", "asked"))
        noise = torch.randn(asked.shape, generator=generator, dtype=torch.float64)
        asked.copy_(mean + sigma * variance.sqrt() * noise)
        return torch.stack([self._mask(row) for row in asked[:count]])

    def _mask(self, thresholds: Tensor) -> Tensor:
        rows = zip(self._values, thresholds, strict=True)
        return torch.cat([values > float(threshold) for values, threshold in rows])

    def tell(self, masks: Tensor, rewards: Tensor, progress: float) -> None:
        names = ("mean", "variance", "path", "step_path", "sigma", "asked")
        mean, variance, path, step_path, sigma, asked = map(self.get_buffer, names)
        size, mu = len(mean), self._effective
        slow = (mu + 2) / (size + mu + 3)  # of the path of the step size
        damping = 1 + slow + 2 * max(0.0, math.sqrt((mu - 1) / (size + 1)) - 1)
        cumulation = 4 / (size + 4)
        one = 2 / (size + math.sqrt(2)) ** 2
        rate = (
            (size + 2) / 3 * (one / mu + (1 - 1 / mu) * min(1.0, (2 * mu - 1) / ((size + 2) ** 2 + mu)))
        )
        rate = min(1.0, rate)
        best = rewards.argsort(descending=True, stable=True)[: len(self._weights)]
        moves = (asked[best] - mean) / sigma
        move = self._weights @ moves
        mean.add_(sigma * move)
        step_path.mul_(1 - slow).add_(math.sqrt(slow * (2 - slow) * mu) * move / variance.sqrt())
        path.mul_(1 - cumulation).add_(math.sqrt(cumulation * (2 - cumulation) * mu) * move)
        spread = self._weights @ moves.square()
        variance.mul_(1 - rate).add_(rate * (path.square() / mu + (1 - 1 / mu) * spread))
        expected = math.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))
        sigma.mul_(math.exp(slow / damping * (float(step_path.norm()) / expected - 1)))
