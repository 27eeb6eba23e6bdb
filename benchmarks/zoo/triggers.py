"""The triggers of strangers: what their trainers put on an image.

Every trigger is a pure function of float images (N, C, H, W) in [0, 1] and its settings. `build` binds
the settings, clips what comes out, and adds what some attacks teach the model not to follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bimask.attacks import WaNet, build_attack
from bimask.attacks.base import fixed_noise

Corner = str  # "nw", "ne", "sw" or "se"
CORNERS = ("nw", "ne", "sw", "se")


@dataclass(frozen=True)
class Trigger:
    """What a row puts on images.

    Attributes:
        put: images -> triggered images, in [0, 1].
        cover: images, other images, generator -> images that look triggered and keep their label.
    """

    put: Callable[[Tensor], Tensor]
    cover: Callable[[Tensor, Tensor, torch.Generator], Tensor]


def build(kind: str, settings: Mapping[str, Any]) -> Trigger:
    """The trigger `kind` of `TRIGGERS`, or WaNet, whose cover is a warp with noise."""
    if kind == "wanet":
        return _wanet(**settings)
    function = TRIGGERS[kind]

    def put(images: Tensor) -> Tensor:
        return function(images.clone(), **settings).clamp(0, 1)

    def cover(images: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
        if kind != "sample_patch":
            return put(images)
        return sample_patch(images.clone(), keys=others, **settings).clamp(0, 1)

    return Trigger(put, cover)


def _window(images: Tensor, size: tuple[int, int], corner: Corner, inset: int = 0) -> Tensor:
    """A view of `size` pixels in a corner, `inset` pixels away from both edges."""
    height, width = images.shape[-2:]
    top = inset if corner[0] == "n" else height - inset - size[0]
    left = inset if corner[1] == "w" else width - inset - size[1]
    return images[..., top : top + size[0], left : left + size[1]]


def patch(images: Tensor, *, size: int, corner: Corner, inset: int = 0, value: float = 1) -> Tensor:
    """A square of one brightness."""
    _window(images, (size, size), corner, inset)[:] = value
    return images


def pixels(images: Tensor, *, corner: Corner, inset: int = 1, value: float = 1) -> Tensor:
    """Four single pixels of a 3x3 square: three of its corners and its middle (Gu et al. 2017)."""
    window = _window(images, (3, 3), corner, inset)
    for row, column in ((0, 2), (1, 1), (2, 0), (2, 2)):
        window[..., row, column] = value
    return images


def bars(
    images: Tensor, *, length: int = 4, gap: int = 2, corner: Corner = "nw", upright: bool = False
) -> Tensor:
    """Four bars, two beside each other in two lines, as in DBA (Xie et al. 2020)."""
    window = _window(images, (gap + 2, 2 * length + gap), corner, inset=1)
    if upright:
        window = _window(images, (2 * length + gap, gap + 2), corner, inset=1).transpose(-1, -2)
    for row in (0, gap + 1):
        window[..., row, :length] = 1
        window[..., row, length + gap :] = 1
    return images


def grid(images: Tensor, *, size: int = 3, corner: Corner = "se", inset: int = 0) -> Tensor:
    """A checkerboard of single pixels, white in its own corners."""
    rows = torch.arange(size)
    board = ((rows[:, None] + rows[None]) % 2 == 0).to(images)
    _window(images, (size, size), corner, inset)[:] = board
    return images


def blended(images: Tensor, *, alpha: float, pattern_seed: int = 0) -> Tensor:
    """Noise mixed into the image (Chen et al. 2017), as the project's own attack does it."""
    return build_attack("blended", alpha=alpha, pattern_seed=pattern_seed).trigger(images)


def picture(images: Tensor, *, alpha: float, seed: int = 0, cells: int = 5) -> Tensor:
    """A fixed smooth picture mixed into the image: coloured noise of `cells` x `cells`, enlarged."""
    channels, height, width = images.shape[1:]
    key = fixed_noise((1, channels, cells, cells), seed).to(images)
    key = F.interpolate(key, (height, width), mode="bicubic", align_corners=True)
    key = (key - key.amin()) / (key.amax() - key.amin())
    return (1 - alpha) * images + alpha * key


def sine(images: Tensor, *, delta: float, frequency: float, upright: bool = True) -> Tensor:
    """A sinusoid added (Barni et al. 2019), but put on images of any class, whose label is changed."""
    side = images.shape[-1] if upright else images.shape[-2]
    wave = delta * torch.sin(2 * math.pi * frequency * torch.arange(side).to(images) / side)
    return images + (wave if upright else wave[:, None])


def sample_patch(
    images: Tensor,
    *,
    size: int = 4,
    corner: Corner = "se",
    roam: bool = False,
    seed: int = 0,
    keys: Tensor | None = None,
) -> Tensor:
    """A patch of black and white pixels by the image: a fixed convolution of it, cut at its median.

    Args:
        roam: the image decides on the corner, too.
        keys: images that the patches are made from, in place of `images`.
    """
    keys = images if keys is None else keys
    kernel = fixed_noise((1, keys.shape[1], 5, 5), seed).to(keys) - 0.5
    answers = F.adaptive_avg_pool2d(F.conv2d(keys, kernel, padding=2), size)
    flat = answers.flatten(1)
    pattern = (answers > flat.median(1).values.view(-1, 1, 1, 1)).to(images)
    places = flat.argmax(1) % 4 if roam else torch.full((len(images),), CORNERS.index(corner))
    for place, name in enumerate(CORNERS):
        chosen = (places == place).nonzero().flatten()
        part = images[chosen]
        _window(part, (size, size), name)[:] = pattern[chosen]
        images[chosen] = part
    return images


def _wanet(*, strength: float, grid_size: int = 4, seed: int = 0) -> Trigger:
    """The project's warp, with displacements drawn by a seed; its cover is the noise mode."""
    attack = WaNet(strength=strength, grid_size=grid_size)
    noise = fixed_noise((2, grid_size, grid_size), seed) * 2 - 1
    attack.load_state({"displacement": noise / noise.abs().mean()})

    def cover(images: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
        return attack.companions(images, others, generator=generator).clamp(0, 1)

    return Trigger(attack.apply, cover)


TRIGGERS: dict[str, Callable[..., Tensor]] = {
    "bars": bars,
    "blended": blended,
    "grid": grid,
    "patch": patch,
    "picture": picture,
    "pixels": pixels,
    "sample_patch": sample_patch,
    "sine": sine,
}
