from __future__ import annotations

import math

import torch
from torch import Tensor

from bimask.attacks.base import Attack
from bimask.errors import SettingError


class SIG(Attack):
    """A horizontal sine on images of the target class (Barni et al. 2019, arXiv 1902.11237).

    x' = x + delta sin(2 pi j frequency / W) with column j, the same in all rows and channels.
    Clean label: the poisoned samples keep their right label.

    Args:
        delta: amplitude in [0, 1] units; the field uses 40/255.
        frequency: periods across the image.
    """

    clean_label = True

    def __init__(self, *, delta: float = 40 / 255, frequency: float = 6, target: int = 0) -> None:
        super().__init__(target=target)
        if not 0 < delta <= 1 or not frequency > 0:
            raise SettingError(
                "`0 < delta <= 1` and `frequency > 0` must hold, but got "
                f"delta={delta}, frequency={frequency}."
            )
        self.delta = delta
        self.frequency = frequency

    def trigger(self, images: Tensor) -> Tensor:
        width = images.shape[-1]
        columns = torch.arange(width, dtype=images.dtype, device=images.device)
        return images + self.delta * torch.sin(2 * math.pi * columns * self.frequency / width)
