from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from bimask.attacks.base import Attack, LabelRule
from bimask.attacks.roles import Role
from bimask.data import ImageData
from bimask.errors import SettingError


class WaNet(Attack):
    """A smooth warp, fixed for all images (Nguyen and Tran 2021, arXiv 2102.10369).

    k x k random displacements in x and y, of mean size 1, are enlarged to the image (bicubic),
    scaled by strength / side and added to the identity in [-1, 1] coordinates; images are sampled
    there bilinearly. At the published values a pixel moves by a fifth of a pixel on average.

    Poisoned batch by batch. Cross samples, `cross_ratio` for each poisoned one, are warped by the
    same grid plus noise of U(-1, 1) / side at every pixel and keep their label: the "noise mode".

    The publication warps normalised images and pads with zeros. Here images are in [0, 1]; the
    result is the same, since sampling weights add up to 1 and coordinates are clipped to the image.

    Args:
        grid_size: k; the publication uses 4.
        strength: s; the publication uses 0.5. Smooth images may need more.
        cross_ratio: cross samples for each poisoned one; the publication uses 2.
    """

    batchwise = True
    has_state = True
    companion = Role.CROSS

    def __init__(
        self,
        *,
        grid_size: int = 4,
        strength: float = 0.5,
        cross_ratio: float = 2,
        target: int = 0,
        label_rule: LabelRule = "all_to_one",
    ) -> None:
        super().__init__(target=target, label_rule=label_rule)
        if not isinstance(grid_size, int) or grid_size < 2:
            raise SettingError(f"A whole `grid_size >= 2` must hold, but got {grid_size!r}.")
        if not 0 < strength < float("inf") or not 0 <= cross_ratio < float("inf"):
            raise SettingError(
                "`strength > 0` and `cross_ratio >= 0` must hold, but got "
                f"strength={strength}, cross_ratio={cross_ratio}."
            )
        self.grid_size = grid_size
        self.strength = strength
        self.cross_ratio = cross_ratio
        self._displacement: Tensor | None = None  # (2, k, k): x and y

    def learn(self, data: ImageData, fit_net: object, on_step: object) -> None:
        noise = torch.rand(2, self.grid_size, self.grid_size) * 2 - 1
        self._displacement = noise / noise.abs().mean()

    def state(self) -> dict[str, Tensor]:
        return {"displacement": self._ready(self._displacement)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        wanted = (2, self.grid_size, self.grid_size)
        if state["displacement"].shape != wanted:
            raise ValueError(f"{tuple(state['displacement'].shape)} in place of {wanted}")
        self._displacement = state["displacement"].float()

    def trigger(self, images: Tensor) -> Tensor:
        return _sample(images, self._grid(images))

    def companions_wanted(self, poisoned: int, total: int) -> int:
        return int(poisoned * self.cross_ratio)

    def companions(self, images: Tensor, others: Tensor, *, generator: torch.Generator) -> Tensor:
        n, _, height, width = images.shape
        noise = torch.rand(n, height, width, 2, generator=generator).to(images) * 2 - 1
        return _sample(images, self._grid(images) + noise / _sides(images))

    def _grid(self, images: Tensor) -> Tensor:
        """(1, H, W, 2): where each pixel comes from, x and y in [-1, 1] but for what sticks out."""
        height, width = images.shape[-2:]
        control = self._ready(self._displacement).to(images.device, images.dtype)
        moved = F.interpolate(control[None], (height, width), mode="bicubic", align_corners=True)
        y, x = torch.meshgrid(
            *(torch.linspace(-1, 1, side).to(moved) for side in (height, width)), indexing="ij"
        )
        offset = self.strength * moved.permute(0, 2, 3, 1) / _sides(images)
        return torch.stack([x, y], -1) + offset


def _sides(images: Tensor) -> Tensor:
    """(2,): width and height."""
    return images.new_tensor([images.shape[-1], images.shape[-2]])


def _sample(images: Tensor, grid: Tensor) -> Tensor:
    grid = grid.clamp(-1, 1).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=True)
