"""A frozen victim that answers under many masks in one pass.

Only the masks of a purification change, never the weights. So the victim is prepared once: batch norms
that follow a masked convolution are folded into it, and every masked module scales its output by
the factors of the block of images that passes through. A pass of B blocks gives, for each block, just
what a pass of that block alone would give: nothing mixes images. In float32 and bfloat16 that holds bit
for bit on one machine; in float64 a Linear's last bits depend on a row's position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from bimask.errors import warn
from bimask.masking.attention import call_projections
from bimask.masking.copies import copied
from bimask.masking.discovery import images_in
from bimask.masking.layout import bears_channels_last
from bimask.masking.masks import MaskSet, any_called
from bimask.masking.sites import Site, axis_of

# What a batch norm can be folded into, and which one.
FOLLOWED_BY: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: nn.BatchNorm2d,
    nn.Linear: nn.BatchNorm1d,
}
# Kernels are chosen by how many images come; from here on they are the same.
FEWEST = 16


class _Factor:
    """What stands at a site as a hook: factor * value + shift, the factor set by `FrozenNet`.

    Args:
        site: on its module's output or input.
        images: dimension of the value that counts images, block after block; others may be mixed with
            it (windows of an image), if images come first.

    Attributes:
        factor: (B, C), one row a block of images; None scales nothing.
        shift: (C,), of a batch norm that was folded into the module.
        behind: of that norm, where it is a site itself.
    """

    factor: Tensor | None = None
    shift: Tensor | None = None
    behind: _Factor | None = None

    def __init__(self, site: Site, axis: int, images: int = 0) -> None:
        self.site, self.axis, self.images = site, axis, images

    def output(self, _module: nn.Module, _inputs: Any, out: Any) -> Any:
        """A forward hook."""
        if isinstance(out, tuple):
            return (self.scaled(out[0]), *out[1:])
        return self.scaled(out)

    def input(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook."""
        return (self.scaled(inputs[0]), *inputs[1:])

    def scaled(self, value: Tensor) -> Tensor:
        """(B n, ..., C) or (B n, C, ...) -> same; or with the images in dimension 1."""

        def shaped(row: Tensor) -> Tensor:
            return row.view(-1, *[1] * (value.ndim - 2)) if self.axis == 1 else row

        if self.factor is None:
            return value if self.shift is None else value + shaped(self.shift)
        factor = self.site.spread(self.factor, value.shape[self.axis])
        shift = self.shift
        if shift is not None and self.behind is not None and self.behind.factor is not None:
            factor, shift = factor * self.behind.factor, shift * self.behind.factor
        blocks = value.unflatten(self.images, (len(factor), -1))
        shape = [1] * blocks.ndim
        shape[self.images] = len(factor)
        shape[2 if self.axis == 1 else -1] = factor.shape[1]
        factor = factor.view(shape)
        if shift is None:
            out = blocks * factor
        else:
            shift = shift.view(shape) if shift.ndim == 2 else shaped(shift)
            out = torch.addcmul(shift, blocks, factor)
        return out.flatten(self.images, self.images + 1)


def _fold(layer: nn.Module, norm: nn.Module) -> Tensor:
    """Put the scale of a batch norm in eval mode into a convolution or linear layer; its shift, (C,),
    comes back."""
    assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = (variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    dtype = layer.weight.dtype
    rows = scale.view(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight.data = (layer.weight.double() * rows).to(dtype)
    if layer.bias is not None:
        layer.bias.data = (layer.bias.double() * scale).to(dtype)
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
        channels_last: memory format of activations and weights, where the model can bear it: one that
            calls `view` on what it computes cannot.
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
        places = masks.places_in(model)
        self.sites = dict(masks.sites)
        self.activation, self.folded = 0, 0

        def frozen() -> nn.Module:
            own = copied(model).eval().requires_grad_(False)
            if any_called(own, places.values()):
                call_projections(own)
            return own

        plain = frozen()
        with torch.no_grad():
            expected = plain(sample)
        mixed = images_in(plain, places.values(), sample)
        bears = channels_last and bears_channels_last(plain, sample)
        net = self._prepared(plain, places, mixed, fold_batch_norm)
        if self.folded and not self._answers(net, sample, expected):
            # hooks and branches on values do not survive tracing: run the model as it is
            self.folded = 0
            net = self._prepared(frozen(), places, mixed, False)
        self._measure(net, places, sample)
        self.dtype = dtype or expected.dtype
        for factor in self._factors.values():
            factor.shift = None if factor.shift is None else factor.shift.to(self.dtype)
        self.format = torch.channels_last if bears else torch.contiguous_format
        self.net: Any = net.to(dtype=self.dtype, memory_format=self.format)  # type: ignore[call-overload]
        if compile:
            self.net = self._compiled(sample.detach().clone().to(self.dtype, memory_format=self.format))

    def _prepared(
        self, plain: nn.Module, places: dict[str, Site], mixed: dict[str, int], fold: bool
    ) -> nn.Module:
        norms: dict[str, tuple[str, nn.Module]] = {}
        net = plain
        if fold:
            net, norms = _without_batch_norms(plain, {site.module for site in places.values()})
        self.folded = len(norms)
        self._factors = {
            key: _Factor(
                site,
                -1 if site.on_input else axis_of(plain.get_submodule(site.module)),
                mixed.get(key, 0),
            )
            for key, site in places.items()
        }
        gone = {name for name, _ in norms.values()}
        for key, site in places.items():
            factor = self._factors[key]
            if site.module in gone:  # the layer that it was folded into applies its factor
                continue
            module = net.get_submodule(site.module)
            if site.module in norms and not site.on_input:
                name, norm = norms.pop(site.module)
                factor.shift, factor.behind = _fold(module, norm), self._factors.get(name)
            if site.on_input:
                module.register_forward_pre_hook(factor.input)
            else:
                module.register_forward_hook(factor.output)
        return net

    def _compiled(self, sample: Tensor) -> Any:
        """The net compiled, or as it is where either of its passes fails."""
        compiled: Any = torch.compile(self.net)
        try:
            with torch.enable_grad():
                torch.autograd.grad(compiled(sample.requires_grad_()).sum(), sample)
        except Exception as error:  # no compiler here, or a model it cannot take
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warn(f"torch.compile failed ({reason}); the net runs as it is.")
            return self.net
        return compiled

    @staticmethod
    @torch.no_grad()
    def _answers(net: nn.Module, sample: Tensor, expected: Tensor) -> bool:
        got: Tensor = net(sample)
        scale = expected.abs().max().clamp_min(1)
        return got.shape == expected.shape and bool((got - expected).abs().max() <= 1e-3 * scale)

    @torch.no_grad()
    def _measure(self, net: nn.Module, places: dict[str, Site], sample: Tensor) -> None:
        def seen(_module: nn.Module, _inputs: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) else out
            self.activation = max(self.activation, first.numel())

        there = dict(net.named_modules())
        names = dict.fromkeys(site.module for site in places.values() if site.module in there)
        handles = [net.get_submodule(name).register_forward_hook(seen) for name in names]
        net(sample[:1])
        for handle in handles:
            handle.remove()

    def bytes_kept(self, sample: Tensor) -> int:
        """What a pass keeps of one image for its gradient by images and factors, in bytes.

        Args:
            sample: (n, C, H, W) images.
        """
        own = {tensor.untyped_storage().data_ptr() for tensor in self.net.state_dict().values()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        images = sample[:1].expand(FEWEST, *sample.shape[1:]).clone().requires_grad_()
        factors = sample.new_ones(1, sum(self.sites.values()), requires_grad=True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = self(images, factors)  # alive, so that no storage is reused
        assert logits.requires_grad
        return max(1, sum(kept.values()) // FEWEST)

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
                self._factors[site].factor = row
        try:
            logits: Tensor = self.net(_laid_out(images.to(self.dtype), self.format))
        finally:
            for held in self._factors.values():
                held.factor = None
        return logits[:given].to(images.dtype)


def _laid_out(images: Tensor, layout: torch.memory_format) -> Tensor:
    """Images in a memory layout; of one channel, too, where `contiguous` leaves the strides as they
    are."""
    if images.shape[1] == 1 and layout == torch.contiguous_format:
        return images.clone(memory_format=layout)
    return images.contiguous(memory_format=layout)


class _Tracer(fx.Tracer):
    """Keeps convolutions and sites modules of their own, also those whose class is not torch's."""

    def __init__(self, sites: Collection[str]) -> None:
        super().__init__()
        self.sites = sites

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, (nn.Conv2d, nn.Linear)) or module_qualified_name in self.sites
        return whole or super().is_leaf_module(m, module_qualified_name)


def _without_batch_norms(
    net: nn.Module, sites: Collection[str]
) -> tuple[nn.Module, dict[str, tuple[str, nn.Module]]]:
    """The net without the batch norms that alone follow one of these modules, and by module these norms
    with their names.

    A model that cannot be traced comes back as it is.
    """
    try:
        traced = fx.GraphModule(net, _Tracer(sites).trace(net))
    except Exception:  # whatever a model's own forward raises under tracing
        return net, {}
    traced.delete_all_unused_submodules()
    modules = dict(traced.named_modules())
    if not set(sites) <= modules.keys():
        return net, {}
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")

    def called_once(node: Any, *kinds: type[nn.Module]) -> bool:
        return (
            isinstance(node, fx.Node)
            and node.op == "call_module"
            and calls[node.target] == 1
            and type(modules[str(node.target)]) in kinds
        )

    norms: dict[str, tuple[str, nn.Module]] = {}
    for node in list(traced.graph.nodes):
        if not (called_once(node, *FOLLOWED_BY.values()) and node.args):
            continue
        source, norm = node.args[0], modules[str(node.target)]
        alone = called_once(source, *FOLLOWED_BY) and len(source.users) == 1
        if alone and source.target in sites and norm.running_mean is not None:
            if type(norm) is not FOLLOWED_BY[type(modules[str(source.target)])]:
                continue
            norms[str(source.target)] = str(node.target), norm
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
    if not norms:
        return net, {}
    traced.delete_all_unused_submodules()
    traced.recompile()
    for hook in net._forward_pre_hooks.values():  # tracing begins behind the model's own hooks
        traced.register_forward_pre_hook(hook)
    for after in net._forward_hooks.values():
        traced.register_forward_hook(after)
    return traced, norms
