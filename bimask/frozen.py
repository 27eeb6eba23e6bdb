"""A frozen victim that answers under many masks in one pass.

Only the masks of a purification change, never the weights. So the victim is prepared once: batch norms
that follow a masked convolution are folded into it, and every masked module scales its output by
the factors of the block of images that passes through. A pass of B blocks gives, for each block, just
what a pass of that block alone would give: nothing mixes images. In float32 and bfloat16 that holds bit
for bit on one machine; in float64 a Linear's last bits depend on a row's position.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from bimask.masks import MaskSet
from bimask.sites import along_channels

# Kernels are chosen by how many images come; from here on they are the same.
FEWEST = 16


class _Site:
    """What follows a masked module: factor * output + shift, the factor set by `FrozenNet`.

    It stands behind the module as a hook, so that this stays what it was. Blocks have no shift.
    """

    factor: Tensor | None = None
    shift: Tensor | None = None

    def __call__(self, module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        """(B n, C, H, W), or (B n, S, C) of an encoder block -> same."""
        factor, shift = self.factor, self.shift
        if factor is None:
            return out if shift is None else out + shift.view(-1, 1, 1)
        factor = along_channels(factor.unsqueeze(1), module)  # (B, 1, C, 1, 1) or (B, 1, C)
        if factor.ndim == 3:
            factor = factor.unsqueeze(2)  # (B, 1, 1, C): over the tokens
        blocks = out.unflatten(0, (len(factor), -1))
        if shift is None:
            return (blocks * factor).flatten(0, 1)
        return torch.addcmul(shift.view(-1, 1, 1), blocks, factor).flatten(0, 1)


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Put the scale of a batch norm in eval mode into `conv`; its shift, (C,), comes back."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = (variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    dtype = conv.weight.dtype
    conv.weight.data = (conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype)
    if conv.bias is not None:
        conv.bias.data = (conv.bias.double() * scale).to(dtype)
    return shift.to(dtype)


class FrozenNet(nn.Module):
    """A copy of `model`, frozen and prepared: (B n, C, H, W) in [0, 1] -> (B n, K) logits.

    Args:
        model: images in [0, 1] -> logits; it is copied. Nothing in it may mix images, as batch norm
            in training mode would.
        masks: say which modules are masked.
        sample: (n, C, H, W) images; the prepared net must answer them as `model` does.
        dtype: of weights and activations; None keeps the model's. Logits come back in the dtype of
            the images.
        channels_last: memory format of activations and weights.
        fold_batch_norm: fold batch norms into masked convolutions where the model can be traced.
        compile: run through torch.compile; where that fails, run as it is.

    Attributes:
        activation: elements of the largest masked activation of one image.
        folded: batch norms that were folded away.

    Raises:
        MaskMismatchError: masks of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: MaskSet,
        *,
        sample: Tensor,
        dtype: torch.dtype | None = None,
        channels_last: bool = True,
        fold_batch_norm: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__()
        masks.modules_of(model)
        plain = copy.deepcopy(model).eval().requires_grad_(False)
        self.sites = dict(masks.sites)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.activation, self.folded = 0, 0
        with torch.no_grad():
            expected = plain(sample)
        net = self._prepared(plain, fold_batch_norm)
        if self.folded and not self._answers(net, sample, expected):
            # hooks and branches on values do not survive tracing: run the model as it is
            self.folded = 0
            net = self._prepared(copy.deepcopy(model).eval().requires_grad_(False), False)
        self._measure(net, sample)
        self.dtype = dtype or expected.dtype
        for site in self._sites.values():
            site.shift = None if site.shift is None else site.shift.to(self.dtype)
        self.net: Any = net.to(dtype=self.dtype, memory_format=self.format)  # type: ignore[call-overload]
        if compile:
            self.net = self._compiled(sample.detach().clone().to(self.dtype, memory_format=self.format))

    def _prepared(self, net: nn.Module, fold: bool) -> nn.Module:
        norms: dict[str, nn.BatchNorm2d] = {}
        if fold:
            net, norms = _without_batch_norms(net, self.sites)
        self.folded = len(norms)
        self._sites = {}
        for name in self.sites:
            module = net.get_submodule(name)
            self._sites[name] = site = _Site()
            if name in norms and isinstance(module, nn.Conv2d):
                site.shift = _fold(module, norms[name])
            module.register_forward_hook(site)
        return net

    def _compiled(self, sample: Tensor) -> Any:
        """The net compiled, or as it is where either of its passes fails."""
        compiled: Any = torch.compile(self.net)
        try:
            with torch.enable_grad():
                torch.autograd.grad(compiled(sample.requires_grad_()).sum(), sample)
        except Exception as error:  # no compiler here, or a model it cannot take
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(f"torch.compile failed ({reason}); the net runs as it is.", stacklevel=4)
            return self.net
        return compiled

    @staticmethod
    @torch.no_grad()
    def _answers(net: nn.Module, sample: Tensor, expected: Tensor) -> bool:
        got: Tensor = net(sample)
        scale = expected.abs().max().clamp_min(1)
        return got.shape == expected.shape and bool((got - expected).abs().max() <= 1e-3 * scale)

    @torch.no_grad()
    def _measure(self, net: nn.Module, sample: Tensor) -> None:
        def seen(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
            self.activation = max(self.activation, out[0].numel())

        handles = [net.get_submodule(name).register_forward_hook(seen) for name in self.sites]
        net(sample[:1])
        for handle in handles:
            handle.remove()

    def forward(self, images: Tensor, factors: Tensor | None = None) -> Tensor:
        """Logits of B blocks of n images.

        Args:
            images: (B n, C, H, W), block after block.
            factors: (B, C) factors on the outputs of all sites' channels, one row a block; None means
                the victim itself.
        """
        given = len(images)
        if given < FEWEST:
            blocks = 1 if factors is None else len(factors)
            more = -(-FEWEST * blocks // given) - blocks
            images = torch.cat([images, images.new_zeros(more * given // blocks, *images.shape[1:])])
            if factors is not None:
                factors = torch.cat([factors, torch.ones_like(factors[:1]).expand(more, -1)])
        if factors is not None:
            rows = factors.to(self.dtype).split(list(self.sites.values()), dim=1)
            for site, row in zip(self.sites, rows, strict=True):
                self._sites[site].factor = row
        try:
            logits: Tensor = self.net(images.to(self.dtype).contiguous(memory_format=self.format))
        finally:
            for held in self._sites.values():
                held.factor = None
        return logits[:given].to(images.dtype)


class _Tracer(fx.Tracer):
    """Keeps convolutions and sites modules of their own, also those whose class is not torch's."""

    def __init__(self, sites: Collection[str]) -> None:
        super().__init__()
        self.sites = sites

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, nn.Conv2d) or module_qualified_name in self.sites
        return whole or super().is_leaf_module(m, module_qualified_name)


def _without_batch_norms(
    net: nn.Module, sites: dict[str, int]
) -> tuple[nn.Module, dict[str, nn.BatchNorm2d]]:
    """The net without the batch norms that alone follow a site, and these norms by site.

    A model that cannot be traced comes back as it is.
    """
    try:
        traced = fx.GraphModule(net, _Tracer(sites).trace(net))
    except Exception:  # whatever a model's own forward raises under tracing
        return net, {}
    traced.delete_all_unused_submodules()
    modules = dict(traced.named_modules())
    if not sites.keys() <= modules.keys():
        return net, {}
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")

    def called_once(node: Any, kind: type[nn.Module]) -> bool:
        return (
            isinstance(node, fx.Node)
            and node.op == "call_module"
            and calls[node.target] == 1
            and type(modules[str(node.target)]) is kind
        )

    norms = {}
    for node in list(traced.graph.nodes):
        if not (called_once(node, nn.BatchNorm2d) and node.args):
            continue
        source, norm = node.args[0], modules[str(node.target)]
        alone = called_once(source, nn.Conv2d) and len(source.users) == 1
        if alone and source.target in sites and norm.running_mean is not None:
            norms[str(source.target)] = norm
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
    if not norms:
        return net, {}
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced, norms
