"""ONP-like pruning: a graph network learns from rewards which channels to take out.

After "Optimized Neuron Pruning" (ONP) of Li, Yu, Yi, "Rethinking Pruning for Backdoor Mitigation: An
Optimization Perspective", 2024 (arXiv 2405.17746), as far as it is public: one graph a layer, a node
for each filter, edges where the kernel strengths of two filters are alike, features from average
strengths, residual streams pruned as groups, agents that learn from rewards on few clean images. The
graph network, the actions, the reward, the algorithm and every number are our choice, and no number
of the paper is reproduced: hence ONP-like.

A mask a takes channels out, each node by itself with the probability sigmoid(logit) that a two-layer
graph network of width 32 gives it. An episode is one whole mask, and its reward is

    R(a) = -[w_c max(0, acc_0 - acc(a) - budget) / 0.01 + w_b B(a) + w_n share pruned]

with B the share of the suspect's short cuts that are still followed (`onp_reward`). The gradient is
that of the score function with the other masks of the step as baseline. The result is, of the mask at
probability 0.5, the masks of the first m nodes by logit for m on a log scale and the best that was
drawn, the one with the largest R on held-out images: zeros in the filters and biases of the
convolutions.

Use it where single channels carry a backdoor and few clean images are at hand. It costs a forward
pass of the images for each of 8 masks a step. It needs labels and convolutions; a backdoor that is no
set of channels (WaNet, input-aware triggers) stays.

`policy` has what tells whether the graph is worth its name: `mlp` (nodes see no neighbours), `random`
(masks of random size), `clp` (the order of CLP's bounds) and `per_layer` (thresholds on these bounds,
by a separable CMA-ES of our own) are judged by the same reward with the same number of masks.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bimask.defences.base import CleanData
from bimask.defences.held_out import split
from bimask.defences.loop import Loop, Part
from bimask.defences.pruning.onp_graph import Structure, graphs_of, structure_of
from bimask.defences.pruning.onp_policies import ByLipschitz, Learned, PerLayer, Policy, Random
from bimask.defences.pruning.onp_reward import Bait, Reward
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.simple import (
    BEGINNING,
    Defended,
    Keeper,
    OnOwnStep,
    SimpleDefence,
)
from bimask.errors import ModelError
from bimask.masking.frozen import FrozenNet
from bimask.masking.masks import MaskSet
from bimask.nets.admission import admit

HELD_OUT = 0.3  # of the images, to choose among the masks
SIZES = 12  # masks of the first nodes by logit


class OnpLikeConfig(DefenceConfig):
    """The settings of ONP-like pruning; none was published, all are our choice."""

    policy: Literal["graph", "mlp", "random", "clp", "per_layer"] = Field(
        "graph", description="what proposes masks; all but `graph` are ablations"
    )
    features: Literal["strict", "extended"] = Field(
        "extended",
        description="whether a node says only how strong it reads and is read, or also its CLP bound, "
        "its norm's scale, its clean activation and its depth",
    )
    # a quantile, since cosines of strengths crowd near 1 and differently so in every layer
    quantile: Annotated[
        float,
        Field(ge=0, lt=1, description="share of a layer's pairs of filters that are not joined"),
        Search(0.5, 0.98),
    ] = 0.9
    iterations: Annotated[
        int, Field(ge=1, description="steps, each of `draws` masks"), Search(20, 200, log=True)
    ] = 200
    draws: int = Field(8, ge=2, description="masks a step")
    policy_lr: Annotated[
        float, Field(gt=0, description="of Adam, for the policy"), Search(1e-3, 5e-2, log=True)
    ] = 0.01
    # 1.8 % of the nodes: the first masks are almost the unpruned net, so that rewards tell something
    bias: Annotated[
        float, Field(description="logit of every node in the beginning"), Search(-6.0, -2.0)
    ] = -4.0
    entropy: float = Field(0.01, ge=0, description="weight of the policy's entropy, falling to 0")
    bait: Bait = Field(
        "shared",
        description="what a pruned model should follow no more: the suspect's errors under adversarial "
        "images, or searched triggers towards every class",
    )
    accuracy_drop: float = Field(
        0.02, ge=0, le=1, description="accuracy on clean images that costs no reward"
    )
    accuracy_weight: float = Field(
        1.0, ge=0, description="of each percent of accuracy beyond that, in the reward"
    )
    followed_weight: Annotated[
        float, Field(ge=0, description="of what is still followed"), Search(1.0, 30.0, log=True)
    ] = 10.0
    pruned_weight: Annotated[
        float, Field(ge=0, description="of the share of pruned nodes"), Search(0.01, 3.0, log=True)
    ] = 1.0

    def steps(self, images: int) -> int:
        """Those of the policy."""
        return self.iterations


class _Best(nn.Module):
    """The best mask that was drawn."""

    mask: Tensor
    reward: Tensor

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros(nodes, dtype=torch.bool))
        self.register_buffer("reward", torch.tensor(-torch.inf, dtype=torch.float64))

    def keep(self, masks: Tensor, rewards: Tensor) -> None:
        row = int(rewards.argmax())
        if float(rewards[row]) > float(self.reward):
            self.mask.copy_(masks[row])
            self.reward.copy_(rewards[row])


class OnpLike(SimpleDefence[OnpLikeConfig]):
    """ONP-like pruning."""

    name = "onp_like"
    config = OnpLikeConfig
    needs_labels = True
    numbers = (
        "pruned_share",
        "accuracy_before",
        "accuracy_after",
        "followed_before",
        "followed_after",
    )

    def check(self, model: nn.Module, images: Tensor) -> None:
        net = admit(model, images).model
        _structure(net, images.to(_dtype(net)))

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: OnpLikeConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[OnpLikeConfig]:
        """Learn the policy; steps are what a run goes on from.

        Raises:
            ModelError: the model has no convolution that can be pruned.
            NonFiniteError: the policy's logits are not finite.
        """
        net = admit(model, clean.images).model.requires_grad_(False)
        images = clean.images.to(_dtype(net))
        structure = _structure(net, images)
        rewarded, chosen_by = split(CleanData(images, clean.labels), HELD_OUT, generator)
        masks = MaskSet(structure.sizes()).like(net)
        frozen = FrozenNet(net, masks, sample=images[:4])
        reward, choice = (
            Reward(
                frozen,
                net,
                structure,
                part,
                bait=config.bait,
                budget=config.accuracy_drop,
                accuracy_weight=config.accuracy_weight,
                followed_weight=config.followed_weight,
                pruned_weight=config.pruned_weight,
            )
            for part in (rewarded, chosen_by)
        )
        policy = _policy(net, structure, rewarded.images, config, generator)
        best = _Best(structure.count)
        parts: dict[str, Part] = {"policy": policy, "best": best}
        if isinstance(policy, Learned):
            parts["moments"] = policy.adam

        def ending() -> tuple[dict[str, Tensor], dict[str, float]]:
            proposed = answers(policy, best.mask)
            worth = choice(proposed)
            row = int(worth.reward.argmax())
            numbers = {
                "pruned_share": float(worth.pruned[row]),
                "accuracy_before": choice.before,
                "accuracy_after": float(worth.accuracy[row]),
                "followed_before": choice.followed_before,
                "followed_after": float(worth.followed[row]),
            }
            return structure.tensors(proposed[row]), numbers

        with Loop(
            self,
            model,
            config,
            parts,
            ending,
            generator=generator,
            device=images.device,
            keeper=keeper,
        ) as loop:
            for step in loop.epochs(config.iterations):
                drawn = policy.ask(config.draws, generator)
                worth = reward(drawn)
                policy.tell(drawn, worth.reward, step / config.iterations)
                best.keep(drawn, worth.reward)
                loop.passes.add(forward=len(drawn), backward=0)
                losses = {name: float(term.mean()) for name, term in worth.terms.items()}
                if loop.step(losses, on_step):
                    return loop.result()
            return loop.result()


def answers(policy: Policy, drawn: Tensor) -> Tensor:
    """The masks that the result is chosen from: (M, nodes) booleans, each with a pruned node.

    Args:
        drawn: (nodes,) the best that was drawn.
    """
    found = [drawn]
    chances, ranking = policy.probabilities(), policy.ranking()
    if chances is not None:
        found.append(chances > 0.5)
    if ranking is not None:
        order = ranking.argsort(descending=True, stable=True)
        half = max(1, len(order) // 2)
        for exponent in torch.linspace(0, 1, SIZES).tolist():
            mask = torch.zeros(len(order), dtype=torch.bool)
            mask[order[: max(1, round(half**exponent))]] = True
            found.append(mask)
    kept = [mask for mask in found if mask.any()]
    return torch.stack(kept or [drawn])


def _policy(
    net: nn.Module,
    structure: Structure,
    images: Tensor,
    config: OnpLikeConfig,
    generator: torch.Generator,
) -> Policy:
    if config.policy == "random":
        return Random(structure.count)
    graphs = graphs_of(
        net,
        structure,
        images,
        quantile=config.quantile,
        extended=config.features == "extended",
    )
    if config.policy == "clp":
        order = torch.cat([graph.lipschitz for graph in graphs])
        return ByLipschitz(order, config.iterations * config.draws)
    if config.policy == "per_layer":
        return PerLayer([graph.lipschitz for graph in graphs], config.draws)
    return Learned(
        graphs,
        joined=config.policy == "graph",
        bias=config.bias,
        lr=config.policy_lr,
        entropy=config.entropy,
        generator=generator,
    )


def _structure(net: nn.Module, images: Tensor) -> Structure:
    found = structure_of(net, images)
    if found is None:
        raise ModelError(
            "ONP-like pruning takes channels out of convolutions, and this model has none; take "
            "another defence, such as `ims`."
        )
    return found


def _dtype(net: nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
