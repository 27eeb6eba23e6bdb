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
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from bimask.defences.base import CleanData
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.simple import BEGINNING, Defended, Keeper, OnOwnStep, SimpleDefence, with_tensors
from bimask.errors import ModelError
from bimask.nets.admission import admit

BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


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
        tensors, pruned, channels = {}, 0, 0
        modules = dict(net.named_modules())
        for name, convolution in found.items():
            norm = modules[name]
            bound = channel_lipschitz(modules[convolution], norm)
            out = (bound > bound.mean() + config.u * bound.std()).to(norm.weight.device)
            pruned, channels = pruned + int(out.sum()), channels + len(out)
            for kind in ("weight", "bias"):
                own = getattr(norm, kind).detach()
                tensors[f"{name}.{kind}"] = own.masked_fill(out, 0)
        return Defended(
            self,
            model,
            config,
            tensors,
            {"pruned_share": pruned / channels},
            seconds=time.perf_counter() - began,
        )

    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor], config: ClpConfig) -> nn.Module:
        """A copy of the model with these batch norms."""
        return with_tensors(model, tensors)


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
    return torch.linalg.matrix_norm(weight, ord=2) * scale


@torch.no_grad()
def pairs(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Batch norm -> the convolution whose output it gets as it is, as one forward pass shows.

    By the order of calls or of modules, a batch norm behind a sum would be paired with a convolution
    whose channels it does not scale.
    """
    made: list[tuple[Tensor, str]] = []  # outputs are kept alive, so that no other gets their address
    found: dict[str, str] = {}
    handles = []

    def convolved(name: str) -> Any:
        return lambda _module, _args, output: made.append((output, name))

    def normed(name: str) -> Any:
        def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
            for output, convolution in made:
                if args[0] is output:
                    found[name] = convolution

        return look

    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
            handles.append(module.register_forward_hook(convolved(name)))
        elif isinstance(module, BatchNorm) and module.affine and module.running_var is not None:
            handles.append(module.register_forward_pre_hook(normed(name)))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found
