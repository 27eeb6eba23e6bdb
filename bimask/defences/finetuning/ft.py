"""Plain fine-tuning on clean images and their labels: what every other defence is to be compared with.

Sha, He, Berrang, Humbert, Zhang, "Fine-Tuning Is All You Need to Mitigate Backdoor Attacks", 2022
(arXiv 2212.09067); as a baseline already in Liu, Dolan-Gavitt, Garg, "Fine-Pruning", RAID 2018
(arXiv 1805.12185). All weights w and running statistics follow the clean images x with labels y:

    w <- SGD step along the gradient of the mean of CE(f_w(x), y)

Nothing in the loss asks the model to forget. Weights that only the trigger drives get hardly any
gradient from clean images, so a trigger that clean images share little with often outlives it: Blended
keeps 96 % attack success on PreActResNet18 and CIFAR-10 (arXiv 2411.09585).

Use it as the line that a defence must beat, and where images and labels are plenty. It costs one
forward and one backward pass of every image an epoch. It needs labels, and no other thing of the model
than its gradients.

The first paper's own variant, whose learning rate swings up and down (super-fine-tuning), is not built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.loop import Loop, cosine, logits_of, set_lr
from bimask.defences.sgd import FineTuningConfig, descend, epoch_of, sgd
from bimask.defences.simple import (
    BEGINNING,
    Defended,
    Keeper,
    OnOwnStep,
    SimpleDefence,
)
from bimask.nets.admission import admit


class FtConfig(FineTuningConfig):
    """The settings of plain fine-tuning."""


class Ft(SimpleDefence[FtConfig]):
    """Plain fine-tuning."""

    name = "ft"
    config = FtConfig
    needs_labels = True

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: FtConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[FtConfig]:
        """Fine-tune all weights; batch norms learn, too."""
        net = admit(model, clean.images).model.train().requires_grad_(True)
        optimiser = sgd(net, config)
        with Loop(
            self,
            model,
            config,
            {"net": net, "moments": optimiser},
            lambda: (net.state_dict(), {}),
            generator=generator,
            device=clean.images.device,
            keeper=keeper,
        ) as loop:
            for epoch in loop.epochs(config.epochs):
                set_lr(optimiser, config.lr * cosine(epoch, config.epochs))
                for images, labels in epoch_of(clean, config, generator, net):
                    loss = F.cross_entropy(logits_of(net, images), labels)
                    descend(optimiser, loss)
                    loop.passes.add(forward=1, backward=1)
                    if loop.step({"cross_entropy": loss.item()}, on_step):
                        return loop.result()
            return loop.result()
