"""How much of a model its masks reach."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn

from bimask.masking.discovery import ALL, candidates
from bimask.masking.masks import MaskSet

LEAST_COVERED = 0.2  # share of the parameters in masked layers below which a warning is due


@dataclass(frozen=True)
class Coverage:
    """How much of a model masks reach.

    Attributes:
        parameters: share of the model's numbers in masked layers, in [0, 1].
        sites: share of its sites that are masked, in [0, 1].
        kinds: kind -> masked sites of it.
        unmasked: names of the layers with parameters that no mask reaches, in module order.
    """

    parameters: float
    sites: float
    kinds: dict[str, int]
    unmasked: tuple[str, ...]

    @property
    def warning(self) -> str | None:
        """One sentence where so little is masked that a backdoor can sit beside it; else None."""
        if self.parameters >= LEAST_COVERED:
            return None
        named = ", ".join(self.unmasked[:3])
        return (
            f"Masks reach {100 * self.parameters:.1f} % of the model's parameters, and a backdoor can "
            f"sit in the others ({named}); mask more with `sites: all`, or name sites."
        )

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        return (
            f"{100 * self.sites:.0f} % of the sites are masked ({kinds}), in layers with "
            f"{100 * self.parameters:.0f} % of the parameters"
        )


def coverage(model: nn.Module, masks: MaskSet, images: Tensor) -> Coverage:
    """How much of a model its masks reach.

    Args:
        model: images -> logits (N, K), in eval mode.
        images: (N, C, H, W), a few.
    """
    sites = masks.places_in(model)
    masked = {site.module for site in sites.values()}
    own = {
        name: sum(p.numel() for p in module._parameters.values() if p is not None)
        for name, module in model.named_modules()
    }
    under = tuple(f"{name}." for name in masked)  # a block's own layers, an attention's projection

    def reached(name: str) -> bool:
        return name in masked or name.startswith(under)

    kinds = Counter[str](site.kind for site in sites.values())
    every = {site.key for site in candidates(model, images[:4]) if site.kind in ALL} | sites.keys()
    return Coverage(
        parameters=sum(n for name, n in own.items() if reached(name)) / max(1, sum(own.values())),
        sites=len(sites) / len(every),
        kinds=dict(kinds),
        unmasked=tuple(name for name, n in own.items() if n and not reached(name)),
    )
