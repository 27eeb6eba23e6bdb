"""Invertible masks: learned per-channel factors on a frozen model's convolutions, linear layers,
attention heads or encoder blocks (`bimask.masking.sites`).

A channel has a mask variable a and a selection variable s, both in [0, 1]. With
sigma(a) = sigmoid(k (a - 1/2)) the factor on the channel's output is (Dunnett et al. 2025, eqs. 1, 2)

    keep      a'    = sigma(a)     + s (1 - sigma(a))
    inverse   abar' = sigma(1 - a) + s (1 - sigma(1 - a))          and  a' + abar' = 1 + s.

s = 1 keeps the channel both ways; s = 0 gives it to one side. The factor multiplies the output of
a convolution *before* the batch norm that follows, so a channel at 0 is constant, not zero.
At a = s = 1 both sides are the identity and no gradient reaches a: only s can move first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bimask.errors import MaskMismatchError, SettingError
from bimask.masking.attention import called_projections, can_be_called
from bimask.masking.copies import copied
from bimask.masking.sites import (
    ChannelGate,
    Site,
    axis_of,
    foldable,
    gate_at,
    like,
    module_of,
    site_at,
    sites_of,
    times,
)


def keep_factor(
    mask: Tensor,
    selection: Tensor,
    sharpness: Tensor | float,
    *,
    inverse: bool = False,
    straight_through: bool = False,
) -> Tensor:
    """The factor on every channel's output: equation 1, or 2 with `inverse`.

    Args:
        mask, selection: a and s, (..., C) in [0, 1].
        sharpness: k > 0, a number or one for each row, (..., 1).
        straight_through: sigma is 0 or 1, with the slope of the soft one (Bengio et al. 2013,
            arXiv 1308.3432).

    Returns:
        (..., C) in [s, 1].
    """
    sign = -1 if inverse else 1
    sigma = torch.sigmoid(sign * sharpness * (mask - 0.5))
    if straight_through:
        # at the middle one side keeps the channel, so that both still add up to 1 + s
        kept = sigma > 0.5 if inverse else sigma >= 0.5
        sigma = kept.to(sigma) + (sigma - sigma.detach())
    return sigma + selection * (1 - sigma)


class InvertibleMask(nn.Module):
    """Mask a and selection s of a number of channels.

    Args:
        channels: C.
        sharpness: k > 0, the slope of sigma; the paper uses 20.
        mask, selection: initial a and s, in [0, 1]; the paper uses 1 and 1.
        straight_through: decide every channel, see `keep_factor`; the paper's masks stay soft.

    Attributes:
        mask, selection: parameters (C,), kept in [0, 1] by `clamp_`.
    """

    def __init__(
        self,
        channels: int,
        *,
        sharpness: float = 20.0,
        mask: float = 1.0,
        selection: float = 1.0,
        straight_through: bool = False,
    ) -> None:
        super().__init__()
        if not sharpness > 0:
            raise SettingError(f"`sharpness > 0` must hold, but got sharpness={sharpness}.")
        for name, value in (("mask", mask), ("selection", selection)):
            if not 0 <= value <= 1:
                raise SettingError(f"`0 <= {name} <= 1` must hold, but got {name}={value}.")
        self.sharpness, self.straight_through = sharpness, straight_through
        self.mask = nn.Parameter(torch.full((channels,), float(mask)))
        self.selection = nn.Parameter(torch.full((channels,), float(selection)))

    def keep(self, *, inverse: bool = False) -> Tensor:
        """The factor of every channel, (C,) in [s, 1]; equation 1, or 2 with `inverse`."""
        return keep_factor(
            self.mask,
            self.selection,
            self.sharpness,
            inverse=inverse,
            straight_through=self.straight_through,
        )

    @torch.no_grad()
    def clamp_(self) -> None:
        """Put a and s back into [0, 1], as after every step of the mask optimiser."""
        self.mask.clamp_(0, 1)
        self.selection.clamp_(0, 1)


class MaskSet(InvertibleMask):
    """The masks of one model: one vector over all its masked channels, cut into named sites.

    One flat vector costs an optimiser one update instead of one for every layer.

    Args:
        sites: key of a site (`bimask.masking.sites.Site`) -> its channels, in module order.
        gates: keys of sites whose factor is no factor on weights, as a look at the model's answers
            showed (`bimask.masking.discovery`); folding puts a gate there.
        sharpness, mask, selection, straight_through: as in `InvertibleMask`.
    """

    def __init__(
        self,
        sites: Mapping[str, int],
        *,
        gates: Collection[str] = (),
        sharpness: float = 20.0,
        mask: float = 1.0,
        selection: float = 1.0,
        straight_through: bool = False,
    ) -> None:
        if not sites:
            raise MaskMismatchError(
                "No site to mask: the model has no Conv2d and no encoder block, which are what the "
                "published setting masks; `sites: all` masks linear layers too, but for the last."
            )
        super().__init__(
            sum(sites.values()),
            sharpness=sharpness,
            mask=mask,
            selection=selection,
            straight_through=straight_through,
        )
        self.sites = dict(sites)
        self.gates = frozenset(gates)

    @classmethod
    def for_model(cls, model: nn.Module, **values: Any) -> MaskSet:
        """A mask for every Conv2d of `model`, squeeze-excite and shortcuts too, as published; for
        every encoder block instead where it has some. `bimask.masking.discovery` finds other sites."""
        return cls(sites_of(model), **values).like(model)

    def like(self, model: nn.Module) -> MaskSet:
        """These masks in the dtype and on the device of the model that they mask."""
        return self.to(like(model, module_of(next(iter(self.sites)))))

    def keeps(self, *, inverse: bool = False) -> dict[str, Tensor]:
        """Site -> (C_site,) factor in [0, 1]."""
        return self.by_site(self.keep(inverse=inverse))

    def selections(self) -> tuple[Tensor, ...]:
        """s of every site, (C_site,) each, in module order."""
        return self.selection.split(list(self.sites.values()))

    def by_site(self, values: Tensor) -> dict[str, Tensor]:
        """Cut a vector (C,) over all channels into the sites' own, in their order."""
        return dict(zip(self.sites, values.split(list(self.sites.values())), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """`SITE.mask` and `SITE.selection` of every site, detached, on the CPU: what is saved; and
        `SITE.gate`, a 1, of those in `gates`."""
        columns = {"mask": self.by_site(self.mask), "selection": self.by_site(self.selection)}
        saved = {
            f"{site}.{column}": values[site].detach().cpu().clone()
            for site in self.sites
            for column, values in columns.items()
        }
        return saved | {f"{site}.gate": torch.ones(1) for site in sorted(self.gates)}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], *, sharpness: float, straight_through: bool = False
    ) -> MaskSet:
        """The masks that `tensors()` wrote; how to read them is part of the configuration.

        Raises:
            MaskMismatchError: a site lacks its mask or selection, or their shapes differ.
        """
        gates = {name.removesuffix(".gate") for name in tensors if name.endswith(".gate")}
        tensors = {name: value for name, value in tensors.items() if not name.endswith(".gate")}
        names = [name.removesuffix(".mask") for name in tensors if name.endswith(".mask")]
        expected = {f"{name}.{column}" for name in names for column in ("mask", "selection")}
        if set(tensors) != expected or not names:
            odd = sorted(set(tensors) ^ expected) or ["nothing"]
            raise MaskMismatchError(
                f"A mask file holds SITE.mask and SITE.selection of every site, got {odd[0]!r} "
                "without its counterpart."
            )
        for name in names:
            shapes = tensors[f"{name}.mask"].shape, tensors[f"{name}.selection"].shape
            if shapes[0] != shapes[1] or len(shapes[0]) != 1:
                raise MaskMismatchError(
                    f"Mask and selection of {name!r} must be vectors of one length, got {shapes}."
                )
        masks = cls(
            {name: len(tensors[f"{name}.mask"]) for name in names},
            gates=gates & set(names),
            sharpness=sharpness,
            straight_through=straight_through,
        )
        masks = masks.to(tensors[f"{names[0]}.mask"].dtype)
        with torch.no_grad():
            masks.mask.copy_(torch.cat([tensors[f"{name}.mask"] for name in names]))
            masks.selection.copy_(torch.cat([tensors[f"{name}.selection"] for name in names]))
        return masks

    def places_in(self, model: nn.Module) -> dict[str, Site]:
        """The site of `model` behind each key.

        Raises:
            MaskMismatchError: naming the first site that is missing or of another size.
        """
        found = {}
        for key, channels in self.sites.items():
            site = site_at(model, key, channels)
            if site is None:
                there = dict(model.named_modules()).get(module_of(key))
                raise MaskMismatchError(
                    f"The masks have a site {key!r} of {channels} channels, but the model has "
                    f"{there!r} there; use the masks with the model they were made for."
                )
            found[key] = site
        return found


@contextmanager
def _hooked(model: nn.Module, masks: MaskSet, factors: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply every site by its factor while the context is open."""
    sites = masks.places_in(model)
    with ExitStack() as undo:
        if any_called(model, sites.values()):
            undo.enter_context(called_projections(model))
        for key, site in sites.items():
            module = model.get_submodule(site.module)
            handle = (
                module.register_forward_pre_hook(_times_input(site, factors[key]))
                if site.on_input
                else module.register_forward_hook(_times_output(factors[key], axis_of(module)))
            )
            undo.callback(handle.remove)
        yield


def masked(model: nn.Module, masks: MaskSet, *, inverse: bool = False) -> AbstractContextManager[None]:
    """The model under its masks, whatever it is asked while the context is open."""
    return _hooked(model, masks, masks.keeps(inverse=inverse))


def any_called(model: nn.Module, sites: Collection[Site] | Any) -> bool:
    """Whether a site is the output layer of an attention that calls none: see
    `bimask.masking.attention`."""
    parents = {site.module.rpartition(".")[0] for site in sites}
    return any(can_be_called(model.get_submodule(name)) for name in parents)


def _times_output(factor: Tensor, axis: int) -> Callable[..., Any]:
    def hook(_module: nn.Module, _inputs: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (times(out[0], factor, axis), *out[1:])
        return times(out, factor, axis)

    return hook


def _times_input(site: Site, factor: Tensor) -> Callable[..., Any]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] * site.spread(factor, inputs[0].shape[-1]), *inputs[1:])

    return hook


def masked_forward(
    model: nn.Module, masks: MaskSet, images: Tensor, *, inverse: bool = False
) -> Tensor:
    """Logits of `model` under its masks: (N, C, H, W) in [0, 1] -> (N, K).

    Differentiable with respect to masks and images. No hook stays behind, also after an exception.

    Raises:
        MaskMismatchError: before the model is touched, naming the site that does not fit.
    """
    with masked(model, masks, inverse=inverse):
        logits: Tensor = model(images)
    return logits


def fold(model: nn.Module, masks: MaskSet, *, inverse: bool = False) -> nn.Module:
    """A new plain model of the same architecture whose weights carry the masks.

    Exact: a factor on a layer's output is a factor on its rows of weights and its bias, one on the
    heads before it a factor on its columns. The argument is left bit for bit as it was; folding can be
    undone only by keeping it. Where weights cannot take a mask (encoder blocks, weights that are
    computed or shared, `MaskSet.gates`) the module comes back in a `ChannelGate`.
    """
    masks.places_in(model)  # refuse before the copy is paid for
    folded = copied(model)
    fold_into(folded, model, masks, inverse=inverse)
    return folded


@torch.no_grad()
def fold_into(target: nn.Module, model: nn.Module, masks: MaskSet, *, inverse: bool = False) -> None:
    """Overwrite the sites of `target`, a copy of `model`, with masked ones."""
    sites = masks.places_in(model)
    masks.places_in(target)
    folds = foldable(model, sites.values()) - masks.gates
    folded: dict[str, list[tuple[Site, Tensor]]] = {}
    for key, factor in masks.keeps(inverse=inverse).items():
        site = sites[key]
        if key in folds:
            folded.setdefault(site.module, []).append((site, factor))
        else:
            _gate(gate_at(target, site.module), site, factor)
    for name, factors in folded.items():
        source, module = model.get_submodule(name), target.get_submodule(name)
        module = module.block if isinstance(module, ChannelGate) else module
        _fold_layer(source, module, factors)


def _gate(gate: ChannelGate, site: Site, factor: Tensor) -> None:
    """Write a site's factor into the gate around its module."""
    if not site.on_input:
        gate.factor.copy_(factor)
        return
    width: int = gate.block.in_features  # type: ignore[assignment]
    gate.input_factor = site.spread(factor, width).to(gate.factor).clone()


def _fold_layer(source: nn.Module, module: nn.Module, factors: Collection[tuple[Site, Tensor]]) -> None:
    """Write the weights of `source`, times the factors on its outputs and inputs, into `module`."""
    weight: Tensor | None = source._parameters["weight"]
    bias: Tensor | None = source._parameters.get("bias")
    assert weight is not None
    for site, factor in factors:
        if site.on_input:
            weight = weight * site.spread(factor, weight.shape[1])
        elif site.kind == "embedding":
            weight = weight * factor
        else:
            weight = weight * factor.view(-1, *[1] * (weight.ndim - 1))
            bias = None if bias is None else bias * factor
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            module._parameters[name].copy_(value)  # type: ignore[union-attr]
