"""How a classifier is trained, on data that was poisoned before or is poisoned batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.attacks import Attack
from bimask.data import ImageData, augment
from bimask.defences.finetuning.ft_sam import sam_step
from bimask.devices import fast_bfloat16
from bimask.errors import NonFiniteError
from bimask.victims.training_state import Checkpoint, TrainingState

WARMUP = 0.3  # share of the steps in which the rate rises, where nothing is said
ONEDNN_BLOCK = 16  # channels, of AVX-512; AVX2 has 8


def fit(
    data: ImageData,
    *,
    fresh_net: Callable[[ImageData], nn.Module],
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    shift: int,
    flip: bool,
    precision: Literal["float32", "bfloat16"],
    seed: int,
    optimizer: Literal["sgd", "adamw"] | None = None,
    warmup: float | None = None,
    sam_rho: float | None = None,
    attack: Attack | None = None,
    share: float = 0.0,
    on_epoch: Callable[[int, float, nn.Module], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> nn.Module:
    """Train a net: one cycle of the learning rate, the last epoch's weights.

    Args:
        data: images to train on, on the device to train on. Shifts and flips come after triggers.
        fresh_net: a net for such images, images in [0, 1] -> logits, with the weights to start from.
        lr: the largest of the cycle, which starts at a 25th of it and ends near 0.
        optimizer: "sgd" (also None) with Nesterov momentum 0.9, which follows the cycle, or "adamw".
        warmup: share of the steps in which the rate rises; None is 0.3.
        sam_rho: size of the adaptive perturbation of sharpness-aware minimisation (Kwon et al. 2021,
            equation 6); None trains without.
        attack: poisons every batch, a share `share` of it; it learns with the net if it can. None
            where `data` is clean or holds its triggers already.
        on_epoch: called with the epoch just done (from 1), its mean loss and the net.
        checkpoint: where the state is kept after every epoch. A training goes on from what is there
            and ends with the bits of one that was never interrupted.

    Returns:
        The net, images in [0, 1] -> logits, in eval mode.

    Raises:
        NonFiniteError: the training diverged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draws = torch.Generator().manual_seed(seed)  # of the attack: order and shifts keep their own
        model = fresh_net(data)
        layout = _layout(model)
        model.to(data.images.device, memory_format=layout)  # type: ignore[call-overload]
        steps = max(1, len(data) // batch_size)
        low = precision == "bfloat16" and fast_bfloat16(data.images.device)
        descent = _optimizer(optimizer or "sgd", model, lr, weight_decay)
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            descent,
            lr,
            total_steps=epochs * steps,
            pct_start=WARMUP if warmup is None else warmup,
            cycle_momentum=isinstance(descent, torch.optim.SGD),
        )
        state = TrainingState(model, descent, cycle, draws, attack, data.images.device)
        behind = state.restore(checkpoint) if checkpoint is not None else 0
        for epoch in range(behind + 1, epochs + 1):
            model.train()
            losses = []
            order = torch.randperm(len(data)).to(data.images.device)
            for rows in order[: steps * batch_size].chunk(steps):
                images, labels, penalty = data.floats(rows), data.labels[rows], None
                if attack is not None:
                    batch = attack.poison_batch(
                        images, labels, data.num_classes, share=share, generator=draws
                    )
                    images, labels, penalty = batch.images, batch.labels, batch.penalty
                images = augment(images, shift=shift, flip=flip).contiguous(memory_format=layout)

                def loss_of(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                    with torch.autocast(images.device.type, torch.bfloat16, enabled=low):
                        logits = model(images)
                    return F.cross_entropy(logits.float(), labels)

                if sam_rho is None:
                    loss = loss_of()
                    descent.zero_grad()
                    (loss if penalty is None else loss + penalty).backward()
                    descent.step()
                else:
                    loss = sam_step(model, descent, loss_of, sam_rho)
                cycle.step()
                if attack is not None:
                    attack.step()
                losses.append(loss.detach())
            mean_loss = torch.stack(losses).mean().item()
            if not mean_loss < float("inf"):
                raise NonFiniteError(
                    f"The victim's training diverged in epoch {epoch}: loss {mean_loss}; lower `lr`."
                )
            if checkpoint is not None:
                state.save(checkpoint, epoch)
            if on_epoch is not None:
                on_epoch(epoch, mean_loss, model)
    return model.eval()


def _layout(model: nn.Module) -> torch.memory_format:
    """channels_last, but for narrow nets with a strided convolution of one pixel.

    oneDNN's gradient of its weights writes past the workspace there, and the process dies (oneDNN
    issue 6035).
    """
    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (1, 1)
            and module.stride != (1, 1)
            and module.in_channels < ONEDNN_BLOCK
        ):
            return torch.contiguous_format
    return torch.channels_last


def _optimizer(
    name: Literal["sgd", "adamw"], model: nn.Module, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay, nesterov=True
        )
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
