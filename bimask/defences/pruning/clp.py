"""Channel Lipschitz pruning: no data, one singular value a channel.

Zheng, Tang, Li, Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022
(arXiv 2208.03111). A channel that a trigger drives is one that can change a lot. Its bound, of a
convolution W and the batch norm behind it (equation 9):

    UCLC_k = sigma_max(W_k as a matrix (in, height x width)) |gamma_k| / sqrt(var_k + eps)

gamma_k and beta_k become 0 where UCLC_k > mean + u std over the channels of the layer.

Use it as a first look, and where there are no clean images to learn from. It costs one singular value
decomposition a channel, seconds on a CPU. It needs batch norms right behind convolutions. The published
program pairs a batch norm with the convolution before it in the order of modules, which in residual
nets may be another one; here a forward pass shows the pairs.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from bimask.defences.base import CleanData
from bimask.defences.pruning.layers import BatchNorm, outliers, pairs, share_of, without
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.simple import BEGINNING, Defended, Keeper, OnOwnStep, SimpleDefence
from bimask.errors import ModelError
from bimask.nets.admission import admit


class ClpConfig(DefenceConfig):
    """The one setting of channel Lipschitz pruning."""

    u: Annotated[
        float,
        Field(ge=0, description="standard deviations above a layer's mean that a channel may have"),
        Search(0.0, 10.0),
    ] = 3.0


class Clp(SimpleDefence[ClpConfig]):
    """Channel Lipschitz pruning."""

    name = "clp"
    config = ClpConfig
    numbers = ("pruned_share",)

    def check(self, model: nn.Module, images: Tensor) -> None:
        _admitted(model, images)

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: ClpConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[ClpConfig]:
        """Prune once. The images only show which batch norm stands behind which convolution.

        Raises:
            ModelError: the model has no batch norm right behind a convolution.
        """
        began = time.perf_counter()
        net, found = _admitted(model, clean.images)
        out = {
            name: outliers(
                channel_lipschitz(net.get_submodule(convolution), net.get_submodule(name)), config.u
            )
            for name, convolution in found.items()
        }
        return Defended(
            self,
            model,
            config,
            without(net, out, "weight", "bias"),
            {"pruned_share": share_of(out)},
            seconds=time.perf_counter() - began,
        )


def _admitted(model: nn.Module, images: Tensor) -> tuple[nn.Module, dict[str, str]]:
    """The net in the model, and its `pairs`."""
    net = admit(model, images).model
    found = pairs(net, images[:1].to(next(net.parameters()).dtype))
    if not found:
        raise ModelError(
            "CLP prunes batch norms right behind convolutions, and this model has none; take "
            "another defence, such as `ims`."
        )
    return net, found


def channel_lipschitz(convolution: nn.Module, norm: nn.Module) -> Tensor:
    """UCLC of every output channel: (C,), float64 on the CPU, since not every device has it; >= 0."""
    assert isinstance(convolution, nn.modules.conv._ConvNd)
    assert isinstance(norm, BatchNorm)
    assert norm.running_var is not None
    weight = convolution.weight.detach().cpu().double().flatten(2)  # (C, in, height x width)
    scale = (
        norm.weight.detach().cpu().double().abs() / (norm.running_var.cpu().double() + norm.eps).sqrt()
    )
    bound: Tensor = torch.linalg.matrix_norm(weight, ord=2) * scale
    return bound
