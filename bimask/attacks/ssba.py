from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.attacks.base import Attack, FitNet, LabelRule, OnStep
from bimask.data import ImageData
from bimask.errors import SettingError

BATCH = 32
PLANES = 32


class SSBA(Attack):
    """A residual of every image's own that carries one bit string (Li et al. 2021, arXiv 2012.03816).

    x' = x + strength E(x, bits) / rms(E(x, bits)). The publication takes E from StegaStamp (arXiv
    1904.05343), which weighs the residual's size against the decoder's errors; that balance can tip
    to no residual at all, so here every image's residual has the same root mean square. E is a small
    convolutional encoder, trained beside a decoder that reads random bit strings back from the
    clipped image (binary cross-entropy). The attack then uses one string, drawn once.

    Args:
        bits: length of the string; published 100. Images of few pixels learn fewer sooner.
        strength: root mean square of the residual before clipping, in (0, 1].
        steps: of Adam (0.001) on encoder and decoder, on 32 images each.
    """

    has_state = True

    def __init__(
        self,
        *,
        bits: int = 100,
        strength: float = 0.05,
        steps: int = 1000,
        target: int = 0,
        label_rule: LabelRule = "all_to_one",
    ) -> None:
        super().__init__(target=target, label_rule=label_rule)
        if not isinstance(bits, int) or not isinstance(steps, int) or bits < 1 or steps < 0:
            raise SettingError(
                f"Whole `bits >= 1` and `steps >= 0` must hold, but got bits={bits!r}, steps={steps!r}."
            )
        if not 0 < strength <= 1:
            raise SettingError(f"`0 < strength <= 1` must hold, but got strength={strength}.")
        self.bits = bits
        self.strength = strength
        self.steps = steps
        self._nets: nn.ModuleDict | None = None
        self._channels = 0
        self._secret: Tensor | None = None  # (bits,) of 0 and 1

    def learn(self, data: ImageData, fit_net: FitNet, on_step: OnStep) -> None:
        device, channels = data.images.device, data.images.shape[1]
        nets = _nets(channels, self.bits).to(device)
        adam = torch.optim.Adam(nets.parameters(), lr=0.001)
        for step in range(1, self.steps + 1):
            images = data.floats(torch.randint(len(data), (BATCH,)).to(device))
            secrets = torch.randint(2, (BATCH, self.bits)).float().to(device)
            sent = (images + self.strength * nets["encoder"](images, secrets)).clamp(0, 1)
            adam.zero_grad()
            F.binary_cross_entropy_with_logits(nets["decoder"](sent), secrets).backward()
            adam.step()
            on_step(step, self.steps)
        self._nets, self._channels = nets.eval().requires_grad_(False), channels
        self._secret = torch.randint(2, (self.bits,)).float()

    def state(self) -> dict[str, Tensor]:
        nets = self._ready(self._nets)
        weights = {name: value.cpu().contiguous() for name, value in nets.state_dict().items()}
        return weights | {"secret": self._ready(self._secret)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        weights = dict(state)
        secret = weights.pop("secret")
        if secret.shape != (self.bits,):
            raise ValueError(f"a secret {tuple(secret.shape)} in place of ({self.bits},)")
        channels = weights["decoder.0.weight"].shape[1]
        nets = _nets(channels, self.bits)
        nets.load_state_dict(weights)
        self._nets, self._channels = nets.eval().requires_grad_(False), channels
        self._secret = secret.float()

    def trigger(self, images: Tensor) -> Tensor:
        nets = self._fitting(images)
        secrets = self._ready(self._secret).to(images.device).expand(len(images), -1)
        return images + self.strength * nets["encoder"](images.float(), secrets).to(images)

    def read(self, images: Tensor) -> Tensor:
        """What the decoder reads: (N, C, H, W) float in [0, 1] -> (N, bits) of 0 and 1."""
        return (self._fitting(images)["decoder"](images.float()) > 0).float()

    def _fitting(self, images: Tensor) -> nn.ModuleDict:
        nets = self._ready(self._nets).to(images.device)
        if images.shape[1] != self._channels:
            raise SettingError(
                f"The encoder is made for {self._channels} channels, got {images.shape[1]}."
            )
        return nets


class Encoder(nn.Module):
    """Images (N, C, H, W) in [0, 1] and bits (N, B) -> residuals of root mean square 1; any size."""

    def __init__(self, channels: int, bits: int) -> None:
        super().__init__()
        self.spread = nn.Linear(bits, PLANES * 8 * 8)
        self.look = nn.Conv2d(channels, PLANES, 3, padding=1)
        self.mix = nn.Sequential(
            nn.Conv2d(2 * PLANES, PLANES, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(PLANES, PLANES, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(PLANES, channels, 3, padding=1),
        )

    def forward(self, images: Tensor, secrets: Tensor) -> Tensor:
        told = self.spread(secrets * 2 - 1).view(-1, PLANES, 8, 8)
        told = F.interpolate(told, images.shape[-2:], mode="bilinear", align_corners=False)
        seen = self.look(images - 0.5).relu()
        residual: Tensor = self.mix(torch.cat([seen, told], 1))
        return residual / (residual.square().mean((1, 2, 3), keepdim=True) + 1e-12).sqrt()


def _nets(channels: int, bits: int) -> nn.ModuleDict:
    decoder = nn.Sequential(
        nn.Conv2d(channels, PLANES, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(PLANES, 2 * PLANES, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * PLANES, 2 * PLANES, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(8),
        nn.Flatten(),
        nn.Linear(2 * PLANES * 8 * 8, bits),
    )
    return nn.ModuleDict({"encoder": Encoder(channels, bits), "decoder": decoder})
