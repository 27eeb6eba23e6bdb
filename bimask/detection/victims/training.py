"""How a detector is trained, on pictures that may be poisoned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from bimask.detection.attacks import Penalty, PoisonedDetection, penalised
from bimask.detection.nets import Detector
from bimask.detection.objects import DetectionData
from bimask.errors import NonFiniteError
from bimask.victims.training_state import Checkpoint, TrainingState

MOST_NORM = 10.0  # of a step's gradient


def fit(
    poisoned: PoisonedDetection,
    *,
    fresh_net: Callable[[DetectionData], Detector],
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    optimizer: Literal["sgd", "adamw"],
    warmup: float,
    seed: int,
    penalty: Penalty | None = None,
    on_epoch: Callable[[int, float, Detector], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Detector:
    """Train a detector: one cosine cycle of the learning rate, the last epoch's weights.

    Args:
        poisoned: pictures to train on, on the device to train on; clean ones have no triggered objects.
        fresh_net: a detector for such pictures, with the weights to start from.
        lr: the largest of the cycle, which starts at a 25th of it and ends near 0.
        optimizer: "sgd" with Nesterov momentum 0.9, which follows the cycle, or "adamw".
        warmup: share of the steps in which the rate rises.
        penalty: BadDet+'s; None trains by the net's own losses alone.
        on_epoch: called with the epoch just done (from 1), its mean loss and the detector.
        checkpoint: where the state is kept after every epoch. A training goes on from what is there
            and ends with the bits of one that was never interrupted.

    Returns:
        The detector in eval mode.

    Raises:
        NonFiniteError: the training diverged.
        ModelError: the net fails on the pictures.
    """
    data = poisoned.data
    device = data.images[0].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        draws = torch.Generator().manual_seed(seed)
        detector = fresh_net(data).to(device)
        steps = max(1, len(data) // batch_size)
        descent = _optimizer(optimizer, detector, lr, weight_decay)
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            descent,
            lr,
            total_steps=epochs * steps,
            pct_start=warmup,
            cycle_momentum=isinstance(descent, torch.optim.SGD),
        )
        state = TrainingState(detector, descent, cycle, draws, None, device)
        behind = state.restore(checkpoint) if checkpoint is not None else 0
        for epoch in range(behind + 1, epochs + 1):
            detector.train()
            losses = []
            order = torch.randperm(len(data), generator=draws)
            for rows in order[: steps * batch_size].chunk(steps):
                chosen = rows.tolist()
                images = [data.images[row].float() / 255 for row in chosen]
                targets = [data.targets[row] for row in chosen]
                if penalty is None:
                    parts = detector.losses(images, targets)
                else:
                    triggered = [poisoned.triggered[row] for row in chosen]
                    parts = penalised(detector, images, targets, triggered, penalty)
                loss = torch.stack([*parts.values()]).sum()
                descent.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(detector.parameters(), MOST_NORM)
                descent.step()
                cycle.step()
                losses.append(loss.detach())
            mean_loss = torch.stack(losses).mean().item()
            if not mean_loss < float("inf"):
                raise NonFiniteError(
                    f"The victim's training diverged in epoch {epoch}: loss {mean_loss}; lower `lr`."
                )
            if checkpoint is not None:
                state.save(checkpoint, epoch)
            if on_epoch is not None:
                on_epoch(epoch, mean_loss, detector)
    return detector.eval()


def _optimizer(
    name: Literal["sgd", "adamw"], detector: Detector, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    weights = [weight for weight in detector.parameters() if weight.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(weights, lr=lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)
    return torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)
