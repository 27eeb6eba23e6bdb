from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.attacks.base import Attack, FitNet, LabelRule, OnStep
from bimask.attacks.roles import PoisonedBatch, Role
from bimask.data import ImageData
from bimask.errors import SettingError
from bimask.files.moments import moments_of, put_moments

BATCH = 128
WIDTHS = (32, 64, 128)  # of the pattern generator, as published
MOMENTS = "moments."  # what Adam remembers, in a state to learn on from


class InputAware(Attack):
    """A trigger of every image's own (Nguyen and Tran 2020, arXiv 2010.08138).

    x' = x + (p(x) - x) m(x): a generator draws the pattern p, another the mask m, both in [0, 1].
    The mask generator is trained first, alone: 100 mean(relu(m - mask_density)) plus diversity, the
    mean of |x1 - x2| / |m1 - m2| over pairs of images. Then the pattern generator is trained with
    the classifier, by its loss on poisoned and cross samples plus the diversity of the patterns.

    Poisoned batch by batch. Cross samples, `cross_ratio` for each poisoned one, carry the pattern
    and the mask of another image and keep their label.

    The generators see images in [0, 1], where the publication feeds normalised ones.

    Args:
        mask_epochs: of the mask generator before; published 25.
        mask_levels: times that the mask generator halves its image, 1 to 3; published 3. Images of few
            pixels get finer masks with fewer.
        mask_width: channels of its first level, doubled by each next; published 32.
        mask_density: how much a pixel of a mask may be at no cost, in [0, 1); published 0.032.
        lr: of Adam (0.5, 0.9) for both generators; published 0.01.
        diversity: weight of the patterns' diversity; published 1.
        cross_ratio: published 1.
    """

    batchwise = True
    has_state = True
    companion = Role.CROSS

    def __init__(
        self,
        *,
        mask_epochs: int = 25,
        mask_levels: int = 3,
        mask_width: int = 32,
        mask_density: float = 0.032,
        lr: float = 0.01,
        diversity: float = 1.0,
        cross_ratio: float = 1,
        target: int = 0,
        label_rule: LabelRule = "all_to_one",
    ) -> None:
        super().__init__(target=target, label_rule=label_rule)
        if not isinstance(mask_epochs, int) or mask_epochs < 0 or not 0 < lr < float("inf"):
            raise SettingError(
                "A whole `mask_epochs >= 0` and `lr > 0` must hold, but got "
                f"mask_epochs={mask_epochs!r}, lr={lr}."
            )
        if not isinstance(mask_width, int) or mask_width < 1:
            raise SettingError(f"A whole `mask_width >= 1` must hold, but got {mask_width!r}.")
        if mask_levels not in (1, 2, 3) or not 0 <= mask_density < 1:
            raise SettingError(
                "`mask_levels` must be 1, 2 or 3 and `0 <= mask_density < 1` hold, but got "
                f"mask_levels={mask_levels!r}, mask_density={mask_density}."
            )
        if not 0 <= diversity < float("inf") or not 0 <= cross_ratio < float("inf"):
            raise SettingError(
                "`diversity >= 0` and `cross_ratio >= 0` must hold, but got "
                f"diversity={diversity}, cross_ratio={cross_ratio}."
            )
        self.mask_epochs = mask_epochs
        self.mask_widths = tuple(mask_width * 2**level for level in range(mask_levels))
        self.mask_density = mask_density
        self.lr = lr
        self.diversity = diversity
        self.cross_ratio = cross_ratio
        self._nets: nn.ModuleDict | None = None
        self._channels = 0
        self._adam: torch.optim.Adam | None = None
        self._drawn: list[tuple[Tensor, Tensor]] = []  # images and their patterns, of this batch

    def learn(self, data: ImageData, fit_net: FitNet, on_step: OnStep) -> None:
        channels, device = data.images.shape[1], data.images.device
        nets = _nets(channels, self.mask_widths).to(device)
        adam = torch.optim.Adam(nets["mask"].parameters(), self.lr, betas=(0.5, 0.9))
        for epoch in range(1, self.mask_epochs + 1):
            for rows in torch.randperm(len(data)).to(device).split(BATCH):
                if len(rows) < 2:
                    continue
                images = data.floats(rows)
                masks = _threshold(nets["mask"](images))
                spread = _diversity(images, masks, images.roll(1, 0), masks.roll(1, 0))
                adam.zero_grad()
                (100 * (masks - self.mask_density).relu().mean() + spread).backward()
                adam.step()
            on_step(epoch, self.mask_epochs)
        self._nets, self._channels = nets.eval().requires_grad_(False), channels
        self._adam = self._fresh_adam(nets)

    def state(self) -> dict[str, Tensor]:
        nets = self._ready(self._nets)
        return {name: value.cpu().contiguous() for name, value in nets.state_dict().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        channels = state["pattern.down.0.0.weight"].shape[1]
        nets = _nets(channels, self.mask_widths)
        nets.load_state_dict(state)
        self._nets, self._channels = nets.eval().requires_grad_(False), channels

    def learning_state(self) -> dict[str, Tensor]:
        moments = moments_of(self._ready(self._adam))
        return self.state() | {f"{MOMENTS}{name}": value for name, value in moments.items()}

    def resume_learning(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        moments = {n.removeprefix(MOMENTS): v for n, v in state.items() if n.startswith(MOMENTS)}
        self.restore({n: v for n, v in state.items() if not n.startswith(MOMENTS)})
        self._adam = self._fresh_adam(self._ready(self._nets).to(device))
        put_moments(self._adam, moments)

    def _fresh_adam(self, nets: nn.ModuleDict) -> torch.optim.Adam:
        return torch.optim.Adam(nets["pattern"].parameters(), self.lr, betas=(0.5, 0.9))

    def trigger(self, images: Tensor) -> Tensor:
        return self._put(images, images)

    def companions_wanted(self, poisoned: int, total: int) -> int:
        return int(poisoned * self.cross_ratio)

    def companions(self, images: Tensor, others: Tensor, *, generator: torch.Generator) -> Tensor:
        return self._put(images, others)

    def poison_batch(
        self,
        images: Tensor,
        labels: Tensor,
        num_classes: int,
        *,
        share: float,
        generator: torch.Generator,
    ) -> PoisonedBatch:
        self._ready(self._nets)["pattern"].train().requires_grad_(True)
        self._drawn.clear()
        batch = super().poison_batch(images, labels, num_classes, share=share, generator=generator)
        if len(self._drawn) < 2:
            return batch
        (one, its_pattern), (other, other_pattern) = self._drawn
        n = min(len(one), len(other))
        spread = _diversity(one[:n], its_pattern[:n], other[:n], other_pattern[:n])
        return replace(batch, penalty=self.diversity * spread)

    def step(self) -> None:
        adam = self._ready(self._adam)
        adam.step()
        adam.zero_grad()  # the publication forgets this
        self._ready(self._nets)["pattern"].eval().requires_grad_(False)
        self._drawn.clear()

    def _put(self, images: Tensor, owners: Tensor) -> Tensor:
        """The owners' patterns on images, where the owners' masks are."""
        nets = self._ready(self._nets).to(images.device)
        if images.shape[1] != self._channels:
            raise SettingError(
                f"The generators are made for {self._channels} channels, got {images.shape[1]}."
            )
        single = owners.float()
        pattern, mask = _unit(nets["pattern"](single)), _threshold(nets["mask"](single))
        if nets["pattern"].training:
            self._drawn.append((single, pattern))
        return images + (pattern.to(images) - images) * mask.to(images)


class Generator(nn.Module):
    """Down some times, up as often: (N, C, H, W) in [0, 1] -> (N, out, H, W), no bounds.

    Halving stops at four pixels, where a batch norm would be left with one value a channel.
    """

    def __init__(self, channels: int, out: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        down, up, planes = [], [], channels
        for width in widths:
            down.append(nn.Sequential(*_convolution(planes, width), *_convolution(width, width)))
            planes = width
        self.middle = nn.Sequential(*_convolution(planes, planes))
        for width in (*widths[-2::-1], out):
            up.append(nn.Sequential(*_convolution(planes, planes), *_convolution(planes, width)))
            planes = width
        up[-1] = up[-1][:-1]  # no ReLU at the end
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)

    def forward(self, x: Tensor) -> Tensor:
        sizes = []
        for block in self.down:
            x = block(x)
            sizes.append(x.shape[-2:])
            if min(x.shape[-2:]) >= 4:
                x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for block, size in zip(self.up, reversed(sizes), strict=True):
            x = block(F.interpolate(x, size, mode="bilinear", align_corners=False))
        return x


def _nets(channels: int, mask_widths: tuple[int, ...]) -> nn.ModuleDict:
    pattern = Generator(channels, channels, WIDTHS)
    return nn.ModuleDict({"pattern": pattern, "mask": Generator(channels, 1, mask_widths)})


def _convolution(planes: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(planes, out, 3, padding=1), nn.BatchNorm2d(out, momentum=0.05), nn.ReLU()


def _unit(raw: Tensor) -> Tensor:
    """To [0, 1] by one tanh; two of them would leave [0.12, 0.88]."""
    return raw.tanh() / 2 + 0.5


def _threshold(raw: Tensor) -> Tensor:
    """A mask of nearly zeros and ones."""
    return (20 * _unit(raw) - 10).tanh() / 2 + 0.5


def _diversity(x1: Tensor, made1: Tensor, x2: Tensor, made2: Tensor) -> Tensor:
    """Mean of |x1 - x2| / |made1 - made2|, root mean squares: high where all images get the same."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        # the root has no slope at 0
        return ((a - b).square().flatten(1).mean(1) + 1e-12).sqrt()

    return (distance(x1, x2) / (distance(made1, made2) + 1e-7)).mean()
