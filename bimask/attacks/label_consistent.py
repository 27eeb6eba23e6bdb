from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.attacks.base import Attack, FitNet, OnStep
from bimask.data import ImageData
from bimask.errors import SettingError


class LabelConsistent(Attack):
    """Images of the target class made hard, with checkers in all four corners (Turner, Tsipras and
    Madry 2019, arXiv 1912.02771).

    Clean label: training samples of the target class keep their label. They are moved against a
    cleanly trained net (projected gradient ascent on its loss, random start, at most `budget` a
    pixel), so that the checkers are the easier thing to learn. Test images get the checkers alone.

    Args:
        size: side of a checker in pixels; its corners and centre are raised, the rest lowered.
        amplitude: by how much, in (0, 1]; the field uses 1, so that pixels turn white and black.
        budget: in [0, 1] units; the field uses 16/255.
        steps: of gradient ascent, each of 2.5 budget / steps.
    """

    clean_label = True

    def __init__(
        self,
        *,
        size: int = 3,
        amplitude: float = 1.0,
        budget: float = 16 / 255,
        steps: int = 40,
        target: int = 0,
    ) -> None:
        super().__init__(target=target)
        if not isinstance(size, int) or not isinstance(steps, int) or size < 1 or steps < 1:
            raise SettingError(
                f"Whole `size >= 1` and `steps >= 1` must hold, but got size={size!r}, steps={steps!r}."
            )
        if not 0 < amplitude <= 1 or not 0 <= budget <= 1:
            raise SettingError(
                "`0 < amplitude <= 1` and `0 <= budget <= 1` must hold, but got "
                f"amplitude={amplitude}, budget={budget}."
            )
        self.size = size
        self.amplitude = amplitude
        self.budget = budget
        self.steps = steps
        self._net: nn.Module | None = None  # poisoning needs it, the trigger does not

    def learn(self, data: ImageData, fit_net: FitNet, on_step: OnStep) -> None:
        self._net = fit_net(data).eval().requires_grad_(False)

    def trigger(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if 2 * self.size > min(height, width):
            raise SettingError(
                f"Four checkers of {self.size} pixels do not fit images of {height}x{width}."
            )
        near, far = slice(None, self.size), slice(-self.size, None)
        cells = torch.arange(self.size, device=images.device)
        checker = self.amplitude * (1 - 2 * ((cells[:, None] + cells) % 2))
        for rows in (near, far):
            for columns in (near, far):
                # mirrored, so that the outermost pixel is raised whatever the size
                turned = checker.flip([d for d, end in ((0, rows), (1, columns)) if end == far])
                images[..., rows, columns] += turned.to(images)
        return images

    def poisoned(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        return self.trigger(self.made_hard(images, generator=generator))

    @torch.enable_grad()
    def made_hard(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Images of the target class that the clean net takes for others, within the budget.

        Raises:
            SettingError: the attack was not prepared.
        """
        net = self._ready(self._net)
        labels = torch.full((len(images),), self.target, device=images.device)
        start = torch.rand(images.shape, generator=generator).to(images) * 2 - 1
        moved = (images + self.budget * start).clamp(0, 1)
        for _ in range(self.steps):
            moved.requires_grad_()
            loss = F.cross_entropy(net(moved), labels, reduction="sum")
            (slope,) = torch.autograd.grad(loss, moved)
            moved = moved.detach() + 2.5 * self.budget / self.steps * slope.sign()
            moved = moved.clamp(images - self.budget, images + self.budget).clamp(0, 1)
        return moved
