from __future__ import annotations

from torch import Tensor

from bimask.attacks.base import Attack, LabelRule
from bimask.errors import SettingError


class BadNets(Attack):
    """A white square flush in the bottom right corner (Gu et al. 2017, arXiv 1708.06733).

    Args:
        size: side of the square in pixels.
        value: its brightness in [0, 1], the same in all channels.
    """

    def __init__(
        self,
        *,
        size: int = 3,
        value: float = 1.0,
        target: int = 0,
        label_rule: LabelRule = "all_to_one",
    ) -> None:
        super().__init__(target=target, label_rule=label_rule)
        if not isinstance(size, int) or size < 1 or not 0 <= value <= 1:
            raise SettingError(
                "A whole `size >= 1` and `0 <= value <= 1` must hold, but got "
                f"size={size}, value={value}."
            )
        self.size = size
        self.value = value

    def trigger(self, images: Tensor) -> Tensor:
        if self.size > min(images.shape[-2:]):
            raise SettingError(
                f"A patch of {self.size} pixels does not fit images of "
                f"{images.shape[-2]}x{images.shape[-1]}."
            )
        images[..., -self.size :, -self.size :] = self.value
        return images
