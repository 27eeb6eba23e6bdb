"""Invertible masks: learned per-channel factors on the convolutions of a frozen model, or on the
encoder blocks of a transformer (`bimask.sites`).

A channel has a mask variable a and a selection variable s, both in [0, 1]. With
sigma(a) = sigmoid(k (a - 1/2)) the factor on the channel's output is (Dunnett et al. 2025, eqs. 1, 2)

    keep      a'    = sigma(a)     + s (1 - sigma(a))
    inverse   abar' = sigma(1 - a) + s (1 - sigma(1 - a))          and  a' + abar' = 1 + s.

s = 1 keeps the channel both ways; s = 0 gives it to one side. The factor multiplies the output of
the convolution *before* the batch norm that follows, so a channel at 0 is constant, not zero.
At a = s = 1 both sides are the identity and no gradient reaches a: only s can move first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bimask.errors import MaskMismatchError, SettingError
from bimask.sites import ChannelGate, along_channels, channels_of, sites_of


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
        sites: dotted module name -> number of output channels, in module order.
        sharpness, mask, selection, straight_through: as in `InvertibleMask`.
    """

    def __init__(
        self,
        sites: Mapping[str, int],
        *,
        sharpness: float = 20.0,
        mask: float = 1.0,
        selection: float = 1.0,
        straight_through: bool = False,
    ) -> None:
        if not sites:
            raise MaskMismatchError("No site to mask: the model has no Conv2d and no encoder block.")
        super().__init__(
            sum(sites.values()),
            sharpness=sharpness,
            mask=mask,
            selection=selection,
            straight_through=straight_through,
        )
        self.sites = dict(sites)

    @classmethod
    def for_model(cls, model: nn.Module, **values: Any) -> MaskSet:
        """A mask for every Conv2d of `model`, squeeze-excite and shortcuts too, as published; for
        every encoder block instead where it has some."""
        masks = cls(sites_of(model), **values)
        return masks.to(next(model.get_submodule(next(iter(masks.sites))).parameters()))

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
        """`SITE.mask` and `SITE.selection` of every site, detached, on the CPU: what is saved."""
        columns = {"mask": self.by_site(self.mask), "selection": self.by_site(self.selection)}
        return {
            f"{site}.{column}": values[site].detach().cpu().clone()
            for site in self.sites
            for column, values in columns.items()
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], *, sharpness: float, straight_through: bool = False
    ) -> MaskSet:
        """The masks that `tensors()` wrote; how to read them is part of the configuration.

        Raises:
            MaskMismatchError: a site lacks its mask or selection, or their shapes differ.
        """
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
            sharpness=sharpness,
            straight_through=straight_through,
        )
        masks = masks.to(tensors[f"{names[0]}.mask"].dtype)
        with torch.no_grad():
            masks.mask.copy_(torch.cat([tensors[f"{name}.mask"] for name in names]))
            masks.selection.copy_(torch.cat([tensors[f"{name}.selection"] for name in names]))
        return masks

    def modules_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """The module of `model` behind each site.

        Raises:
            MaskMismatchError: naming the first site that is missing or of another size.
        """
        named = dict(model.named_modules())
        found = {}
        for site, channels in self.sites.items():
            module = named.get(site)
            if module is None or channels_of(module) != channels:
                raise MaskMismatchError(
                    f"The masks have a site {site!r} of {channels} channels, but the model has "
                    f"{module!r} there; use the masks with the model they were made for."
                )
            found[site] = module
        return found


@contextmanager
def _hooked(model: nn.Module, masks: MaskSet, factors: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the output of every site by its factor while the context is open."""
    modules = masks.modules_of(model)

    def multiply(factor: Tensor):  # type: ignore[no-untyped-def]
        return lambda _module, _inputs, output: output * factor

    handles = []
    try:
        for site, module in modules.items():
            factor = along_channels(factors[site], module)
            handles.append(module.register_forward_hook(multiply(factor)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def masked_forward(
    model: nn.Module, masks: MaskSet, images: Tensor, *, inverse: bool = False
) -> Tensor:
    """Logits of `model` under its masks: (N, C, H, W) in [0, 1] -> (N, K).

    Differentiable with respect to masks and images. No hook stays behind, also after an exception.

    Raises:
        MaskMismatchError: before the model is touched, naming the site that does not fit.
    """
    with _hooked(model, masks, masks.keeps(inverse=inverse)):
        logits: Tensor = model(images)
    return logits


def fold(model: nn.Module, masks: MaskSet, *, inverse: bool = False) -> nn.Module:
    """A new plain model of the same architecture whose weights carry the masks.

    Exact, since a factor on a convolution's output is a factor on its rows of weights and its bias.
    The argument is left bit for bit as it was; folding can be undone only by keeping it. Encoder blocks
    cannot take a mask into their weights: a transformer comes back with a `ChannelGate` around each.
    """
    masks.modules_of(model)  # refuse before the copy is paid for
    folded = copy.deepcopy(model)
    fold_into(folded, model, masks, inverse=inverse)
    return folded


@torch.no_grad()
def fold_into(target: nn.Module, model: nn.Module, masks: MaskSet, *, inverse: bool = False) -> None:
    """Overwrite the sites of `target`, a copy of `model`, with masked ones; no new memory."""
    sources, targets = masks.modules_of(model), masks.modules_of(target)
    for site, factor in masks.keeps(inverse=inverse).items():
        source, module = sources[site], targets[site]
        if isinstance(source, nn.Conv2d) and isinstance(module, nn.Conv2d):
            torch.mul(source.weight, factor.view(-1, 1, 1, 1), out=module.weight)
            if source.bias is not None and module.bias is not None:
                torch.mul(source.bias, factor, out=module.bias)
        elif isinstance(module, ChannelGate):
            module.factor.copy_(factor)
        else:
            target.set_submodule(site, ChannelGate(module, factor))
