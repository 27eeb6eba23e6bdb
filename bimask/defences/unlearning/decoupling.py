"""The parts of BTI-DBF (`bti_dbf`): a net in two, a mask on its features, the losses of every phase."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.loop import logits_of
from bimask.errors import ModelError

SAME = 1e-4  # what rounding may change of a log-probability
Losses = dict[str, Tensor]


class Parted:
    """A net parted in front of the linear layer that its logits come from.

    Args:
        net: images -> logits; it keeps a hook.
        images: (N, C, H, W), some that it can be asked.

    Raises:
        ModelError: they come from no such layer.
    """

    def __init__(self, net: nn.Module, images: Tensor) -> None:
        self.net = net
        self._seen: list[Tensor] = []
        called: list[tuple[nn.Linear, Tensor, Tensor]] = []

        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            assert isinstance(module, nn.Linear)
            if args:
                called.append((module, args[0], out))

        handles = [
            module.register_forward_hook(hook)
            for module in net.modules()
            if isinstance(module, nn.Linear)
        ]
        with torch.no_grad():
            logits = logits_of(net, images[:2].to(next(net.parameters()).dtype))
        for handle in handles:
            handle.remove()
        if not called or not _same(called[-1], logits):
            raise ModelError(
                "BTI-DBF parts a net in front of the linear layer that its logits come from, and this "
                "model's come from none; take another defence, such as `sau`."
            )
        self.head = called[-1][0]
        self.head.register_forward_pre_hook(lambda _module, args: self._seen.append(args[0]))

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, F) and logits (N, K)."""
        self._seen.clear()
        logits = logits_of(self.net, images)
        return self._seen.pop(), logits

    def answers(self, features: Tensor) -> Tensor:
        """The logits (N, K) of features (N, F)."""
        return F.linear(features, self.head.weight, self.head.bias)


def _same(call: tuple[nn.Linear, Tensor, Tensor], logits: Tensor) -> bool:
    """Whether logits are what a linear layer answered, or its log-probabilities."""
    _, features, out = call
    if features.ndim != 2 or out.shape != logits.shape:
        return False
    difference = F.log_softmax(out, 1) - F.log_softmax(logits, 1)
    return bool(difference.abs().max() <= SAME)


class FeatureMask(nn.Module):
    """A factor in [0, 1] on every feature: (tanh(raw) + 1) / 2."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(features))

    def forward(self) -> Tensor:
        """(F,)."""
        return (self.raw.tanh() + 1) / 2

    @torch.no_grad()
    def reset(self) -> None:
        """One half everywhere: no feature is the clean task's more than the backdoor's."""
        self.raw.zero_()


def descend(optimiser: torch.optim.Optimizer, losses: Losses) -> dict[str, float]:
    """One step along the sum of these losses, of the optimiser's parameters alone; the losses."""
    weights = [p for group in optimiser.param_groups for p in group["params"]]
    total = torch.stack(list(losses.values())).sum()
    slopes = torch.autograd.grad(total, weights, allow_unused=True)
    for weight, slope in zip(weights, slopes, strict=True):
        weight.grad = slope
    optimiser.step()
    return {name: loss.item() for name, loss in losses.items()}


def identity_losses(changer: nn.Module, parted: Parted, images: Tensor) -> Losses:
    """What teaches the generator to leave images, their features and their answers as they are."""
    with torch.no_grad():
        features, logits = parted(images)
    changed = changer(images)
    own, answers = parted(changed)
    return {
        "image": 100 * F.mse_loss(changed, images),
        "features": F.mse_loss(own, features),
        "cross_entropy": F.cross_entropy(answers, logits.softmax(1)),
    }


def mask_losses(parted: Parted, mask: Tensor, features: Tensor, labels: Tensor) -> Losses:
    """Low where the features that the mask (F,) keeps answer rightly, and the others do not.

    Args:
        features: (N, F).
        labels: (N,).
    """
    return {
        "kept": F.cross_entropy(parted.answers(mask * features), labels),
        "others": -F.cross_entropy(parted.answers((1 - mask) * features), labels),
    }


def inversion_losses(mask: Tensor, clean: Tensor, changed: Tensor, bound: float) -> Losses:
    """Low where changed images differ in the features that the mask (F,) does not keep.

    Args:
        clean, changed: features (N, F).
        bound: of the mean square that all features may change by.
    """
    return {
        "kept": F.mse_loss(mask * changed, mask * clean),
        "others": -F.mse_loss((1 - mask) * changed, (1 - mask) * clean),
        "beyond": (F.mse_loss(changed, clean) - bound).clamp_min(0),
    }
