from __future__ import annotations

import torch
from torch import Tensor

from bimask.attacks.base import Attack, LabelRule
from bimask.attacks.roles import Role
from bimask.errors import SettingError


class BPP(Attack):
    """Fewer grey levels (BppAttack, Wang et al. 2022, arXiv 2205.13383): every pixel rounded.

    q(x) = round(x (squeeze_num - 1)) / (squeeze_num - 1), without dithering.

    Poisoned batch by batch. Negative samples, a share `negative_rate` of every batch, are
    x + q(r) - r with another image r, clipped to [0, 1]; they keep their label, so that a residual
    that does not belong to the image means nothing.

    Args:
        squeeze_num: levels of a channel, 2 to 255; the field uses 8.
        negative_rate: share of negative samples in a batch; the field uses 0.1.
    """

    batchwise = True
    companion = Role.NEGATIVE

    def __init__(
        self,
        *,
        squeeze_num: int = 8,
        negative_rate: float = 0.1,
        target: int = 0,
        label_rule: LabelRule = "all_to_one",
    ) -> None:
        super().__init__(target=target, label_rule=label_rule)
        if not isinstance(squeeze_num, int) or not 2 <= squeeze_num <= 255:
            raise SettingError(
                f"A whole `2 <= squeeze_num <= 255` must hold, but got squeeze_num={squeeze_num!r}."
            )
        if not 0 <= negative_rate < 1:
            raise SettingError(f"`0 <= negative_rate < 1` must hold, but got {negative_rate}.")
        self.squeeze_num = squeeze_num
        self.negative_rate = negative_rate

    def trigger(self, images: Tensor) -> Tensor:
        steps = self.squeeze_num - 1
        return (images * steps).round() / steps

    def companions_wanted(self, poisoned: int, total: int) -> int:
        return int(self.negative_rate * total)

    def companions(self, images: Tensor, others: Tensor, *, generator: torch.Generator) -> Tensor:
        return images + self.trigger(others) - others
