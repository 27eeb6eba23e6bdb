from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from bimask.attacks.base import Attack, FitNet, LabelRule, OnStep
from bimask.data import ImageData
from bimask.errors import SettingError


class LowFrequency(Attack):
    """A smooth pattern added to every image (Zeng et al. 2021, arXiv 2104.03413): clip(x + P).

    The publication searches a universal perturbation by DeepFool behind a Gaussian low-pass, which
    often fails to end. Here P is made of the lowest `cutoff` cosines along each axis (DCT-II), and
    their coefficients are moved by Adam so that a cleanly trained net gives P's images the attack's
    labels. P always lies in [0, amplitude] and reaches both ends.

    Args:
        amplitude: largest value of the pattern, in (0, 1]; published 0.2.
        cutoff: cosines along an axis, the constant one included, at least 2.
        steps: of the search.
    """

    has_state = True

    def __init__(
        self,
        *,
        amplitude: float = 0.2,
        cutoff: int = 4,
        steps: int = 100,
        target: int = 0,
        label_rule: LabelRule = "all_to_one",
    ) -> None:
        super().__init__(target=target, label_rule=label_rule)
        if not 0 < amplitude <= 1:
            raise SettingError(f"`0 < amplitude <= 1` must hold, but got amplitude={amplitude}.")
        if not isinstance(cutoff, int) or not isinstance(steps, int) or cutoff < 2 or steps < 0:
            raise SettingError(
                "Whole `cutoff >= 2` and `steps >= 0` must hold, but got "
                f"cutoff={cutoff!r}, steps={steps!r}."
            )
        self.amplitude = amplitude
        self.cutoff = cutoff
        self.steps = steps
        self._pattern: Tensor | None = None  # (C, H, W)

    def learn(self, data: ImageData, fit_net: FitNet, on_step: OnStep) -> None:
        net = fit_net(data).eval().requires_grad_(False)
        channels, height, width = data.images.shape[1:]
        down = _cosines(height, self.cutoff).to(data.images.device)
        across = _cosines(width, self.cutoff).to(data.images.device)
        waves = torch.randn(channels, down.shape[1], across.shape[1]).to(down)
        adam = torch.optim.Adam([waves.requires_grad_()], lr=0.1)
        for step in range(1, self.steps + 1):
            rows = torch.randint(len(data), (min(len(data), 128),)).to(data.images.device)
            wanted = self.attack_labels(data.labels[rows], data.num_classes)
            triggered = (data.floats(rows) + self._scaled(down @ waves @ across.T)).clamp(0, 1)
            adam.zero_grad()
            F.cross_entropy(net(triggered), wanted).backward()
            adam.step()
            on_step(step, self.steps)
        self._pattern = self._scaled(down @ waves.detach() @ across.T).cpu()

    def state(self) -> dict[str, Tensor]:
        return {"pattern": self._ready(self._pattern)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if state["pattern"].ndim != 3:
            raise ValueError(f"{tuple(state['pattern'].shape)} in place of (C, H, W)")
        self._pattern = state["pattern"].float()

    def trigger(self, images: Tensor) -> Tensor:
        pattern = self._ready(self._pattern)
        if images.shape[1:] != pattern.shape:
            raise SettingError(
                f"The pattern is made for images {tuple(pattern.shape)}, got {tuple(images.shape[1:])}."
            )
        return images + pattern.to(images)

    def _scaled(self, pattern: Tensor) -> Tensor:
        """To [0, amplitude], over all channels; this changes the constant wave and the scale alone."""
        low, high = pattern.min(), pattern.max()
        return self.amplitude * (pattern - low) / (high - low)


def _cosines(side: int, cutoff: int) -> Tensor:
    """(side, min(cutoff, side)): the lowest waves of the DCT-II, one a column."""
    place = (torch.arange(side) + 0.5) / side
    return torch.cos(math.pi * place[:, None] * torch.arange(min(cutoff, side)))
