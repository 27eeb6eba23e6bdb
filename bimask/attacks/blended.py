from __future__ import annotations

from torch import Tensor

from bimask.attacks.base import Attack, LabelRule, fixed_noise
from bimask.errors import SettingError


class Blended(Attack):
    """x' = (1 - alpha) x + alpha K with a fixed key image K (Chen et al. 2017, arXiv 1712.05526).

    K is the paper's random pattern: uniform noise of the image's own shape, fixed by `pattern_seed`.

    Args:
        alpha: share of the key image, in (0, 1]; the field uses 0.2 for training and test.
        pattern_seed: which pattern.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.2,
        pattern_seed: int = 0,
        target: int = 0,
        label_rule: LabelRule = "all_to_one",
    ) -> None:
        super().__init__(target=target, label_rule=label_rule)
        if not 0 < alpha <= 1:
            raise SettingError(f"`0 < alpha <= 1` must hold, but got alpha={alpha}.")
        if not isinstance(pattern_seed, int):
            raise SettingError(f"`pattern_seed` must be a whole number, got {pattern_seed!r}.")
        self.alpha = alpha
        self.pattern_seed = pattern_seed

    def trigger(self, images: Tensor) -> Tensor:
        key = fixed_noise(tuple(images.shape[1:]), self.pattern_seed).to(images)
        return (1 - self.alpha) * images + self.alpha * key
