"""Pruning by batch norm statistics: channels whose clean inputs differ from those of training.

Zheng, Tang, Li, Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022. A
poisoned training set leaves its mark in the running mean mu_r and variance v_r of a batch norm,
which the mean mu_c and the variance v_c of clean images lack. Their distance, of two Gaussians:

    KL(N(mu_c, v_c) || N(mu_r, v_r)) = 1/2 ln(v_r / v_c) + (v_c + (mu_c - mu_r)^2) / (2 v_r) - 1/2

gamma_k and beta_k become 0 where the distance of channel k is above mean + u std over the channels
of the layer.

Use it where clean images have no labels, or time is short. It costs one pass forward. It
needs batch norms with running statistics.

The published code takes ln(v_r / v_c) without the half, so that distances may be negative; here it
is the divergence itself. v_c is that of all clean images together, where the published code has one
batch's. To both variances the norm's own eps is added, as the norm does, so that a channel that
never varies has distance 0. Images are seen by the net as it answers, with its running statistics
in the layers before.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from bimask.defences.base import CleanData, Passes
from bimask.defences.pruning.layers import BatchNorm, outliers, share_of, with_norms, without
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.simple import BEGINNING, Defended, Keeper, OnOwnStep, SimpleDefence


class BnpConfig(DefenceConfig):
    """The settings of pruning by batch norm statistics."""

    u: Annotated[
        float,
        Field(
            ge=0,
            description="standard deviations above a layer's mean that a channel's distance may have; "
            "3 is published, 4 for Tiny ImageNet",
        ),
        Search(0.0, 10.0),
    ] = 3.0
    batch_size: int = Field(256, ge=1, description="images a pass; changes no result")


class Bnp(SimpleDefence[BnpConfig]):
    """Pruning by batch norm statistics."""

    name = "bnp"
    config = BnpConfig
    numbers = ("pruned_share",)

    def check(self, model: nn.Module, images: Tensor) -> None:
        with_norms(model, images, "BNP")

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: BnpConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[BnpConfig]:
        """Prune once.

        Raises:
            ModelError: the model has no batch norm with a scale.
        """
        began = time.perf_counter()
        net, names = with_norms(model, clean.images, "BNP")
        batches = clean.images.split(config.batch_size)
        out = {
            name: outliers(distance(net.get_submodule(name), mean, variance), config.u)
            for name, (mean, variance) in clean_statistics(net, names, batches).items()
        }
        return Defended(
            self,
            model,
            config,
            without(net, out, "weight", "bias"),
            {"pruned_share": share_of(out)},
            passes=Passes(len(batches), 0),
            seconds=time.perf_counter() - began,
        )


@torch.no_grad()
def clean_statistics(
    net: nn.Module, names: list[str], batches: tuple[Tensor, ...]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Norm -> mean and unbiased variance (C,) of what it is given by all images, float64 on the CPU.

    Args:
        net: in eval mode.
        batches: images (N, C, H, W) in [0, 1].
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def watch(name: str) -> Any:
        def look(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            values = args[0].detach().cpu().double().transpose(0, 1).flatten(1)  # (C, all places)
            middle = values.mean(1)
            apart = (values - middle[:, None]).square().sum(1)
            seen[name].append(torch.stack([torch.full_like(middle, values.shape[1]), middle, apart]))

        return look

    handles = [net.get_submodule(n).register_forward_pre_hook(watch(n)) for n in names]
    try:
        for images in batches:
            net(images.to(next(net.parameters()).dtype))
    finally:
        for handle in handles:
            handle.remove()
    return {name: _pooled(torch.stack(parts)) for name, parts in seen.items()}


def _pooled(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of all, from count, mean and squared deviations (parts, 3, C) of each part."""
    count, middle, apart = parts.unbind(1)
    total = count.sum(0)
    mean = (count * middle).sum(0) / total
    between = (count * (middle - mean).square()).sum(0)
    return mean, (apart.sum(0) + between) / (total - 1).clamp_min(1)


def distance(norm: nn.Module, mean: Tensor, variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || the norm's running statistics) of every channel (C,), >= 0."""
    assert isinstance(norm, BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    own_mean, own = norm.running_mean.cpu().double(), norm.running_var.cpu().double() + norm.eps
    found = variance + norm.eps
    return ((own / found).log() + (found + (mean - own_mean).square()) / own - 1) / 2
