from __future__ import annotations

import torch
from torch import Tensor

from bimask.attacks.base import Attack, LabelRule, fixed_noise
from bimask.attacks.roles import Role
from bimask.errors import SettingError


class AdaptiveBlend(Attack):
    """A key image blended in by pieces, with cover samples (Qi et al. 2023, arXiv 2205.13613).

    The key of `Blended` is cut into pieces x pieces tiles. A training sample shows a random
    `piece_share` of them at `train_alpha`, a test image all of them at `alpha`. Cover samples,
    `cover_ratio` for each poisoned one, show such tiles and keep their label, so that poisoned
    samples do not cluster inside the net.

    The publication poisons 0.003 of the training set and covers as many.

    Args:
        alpha, train_alpha: shares of the key image, in (0, 1]; published 0.2 and 0.15.
        pieces: tiles along a side; published 4.
        piece_share: share of tiles on a training sample, in (0, 1]; published 0.5.
        cover_ratio: cover samples for each poisoned one; published 1.
        pattern_seed: which key image.
    """

    companion = Role.COVER

    def __init__(
        self,
        *,
        alpha: float = 0.2,
        train_alpha: float = 0.15,
        pieces: int = 4,
        piece_share: float = 0.5,
        cover_ratio: float = 1,
        pattern_seed: int = 0,
        target: int = 0,
        label_rule: LabelRule = "all_to_one",
    ) -> None:
        super().__init__(target=target, label_rule=label_rule)
        if not 0 < alpha <= 1 or not 0 < train_alpha <= 1:
            raise SettingError(
                "`0 < alpha <= 1` and `0 < train_alpha <= 1` must hold, but got "
                f"alpha={alpha}, train_alpha={train_alpha}."
            )
        if not isinstance(pieces, int) or not isinstance(pattern_seed, int) or pieces < 1:
            raise SettingError(
                "A whole `pieces >= 1` and a whole `pattern_seed` must hold, but got "
                f"pieces={pieces!r}, pattern_seed={pattern_seed!r}."
            )
        if not 1 <= round(piece_share * pieces**2) <= pieces**2 or not cover_ratio >= 0:
            raise SettingError(
                "`piece_share` must be in (0, 1] and select a piece, and `cover_ratio >= 0` hold, "
                f"but got piece_share={piece_share}, cover_ratio={cover_ratio}."
            )
        self.alpha = alpha
        self.train_alpha = train_alpha
        self.pieces = pieces
        self.shown = round(piece_share * pieces**2)
        self.cover_ratio = cover_ratio
        self.pattern_seed = pattern_seed

    def trigger(self, images: Tensor) -> Tensor:
        return (1 - self.alpha) * images + self.alpha * self._key(images)

    def poisoned(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        alpha = self.train_alpha * self._mask(images, generator)
        return (1 - alpha) * images + alpha * self._key(images)

    def companions_wanted(self, poisoned: int, total: int) -> int:
        return round(poisoned * self.cover_ratio)

    def companions(self, images: Tensor, others: Tensor, *, generator: torch.Generator) -> Tensor:
        return self.poisoned(images, generator=generator)

    def _key(self, images: Tensor) -> Tensor:
        return fixed_noise(tuple(images.shape[1:]), self.pattern_seed).to(images)

    def _mask(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """(N, 1, H, W), 1 where a sample's own random tiles are."""
        n, _, height, width = images.shape
        ranks = torch.rand(n, self.pieces**2, generator=generator).argsort(1).argsort(1)
        tiles = (ranks < self.shown).view(n, 1, self.pieces, self.pieces)
        row = torch.arange(height) * self.pieces // height
        column = torch.arange(width) * self.pieces // width
        return tiles[:, :, row][..., column].to(images)
