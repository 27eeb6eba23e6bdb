"""Fine-pruning: features that clean images leave asleep are cut off, and the rest is fine-tuned.

Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
Networks", RAID 2018 (arXiv 1805.12185). A backdoor lives in features that clean images hardly use.
Of the features behind the last convolution, as the first linear layer after it reads them, those
with the lowest mean over the clean images

    a_k = mean over images of feature k

are pruned first: column k of that layer becomes 0. Pruning ends before the step that costs too much
accuracy on images that are held back; then all weights learn on, and pruned columns stay 0.

Use it as the plain baseline of pruning and fine-tuning. It costs a pass over the images held back
for every step of pruning, and the epochs of fine-tuning. It needs labelled clean images, and a
linear layer, or a convolution without groups, that reads the features.

The last net that was good enough is fine-tuned; published code goes on with the one step too far. A
step takes its share of the features, rounded up. Accuracy is that of clean images held back, where
published code takes test images. Once the number of columns is chosen, all images are learned on.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.base import CleanData, Passes
from bimask.defences.held_out import accuracy, split
from bimask.defences.loop import Loop, cosine, logits_of, set_lr
from bimask.defences.pruning.layers import admitted, weight_of
from bimask.defences.settings import Search
from bimask.defences.sgd import FineTuningConfig, descend, epoch_of, sgd, weights_of
from bimask.defences.simple import BEGINNING, Defended, Keeper, OnOwnStep, SimpleDefence
from bimask.errors import ModelError
from bimask.masking.discovery import watched
from bimask.masking.sites import CONVOLUTIONS


class FinePruningConfig(FineTuningConfig):
    """The settings of fine-pruning; the learning rate follows a cosine to 0 over the epochs."""

    prune_step: float = Field(0.01, gt=0, le=1, description="share of the features that a step prunes")
    max_drop: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="share of the accuracy on the images held back at whose loss pruning ends",
        ),
        Search(0.02, 0.5),
    ] = 0.1
    held_out: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of each class's images that pruning is ended by (our choice; published "
        "programs take 0.1, or the test images)",
    )


class Columns(nn.Module):
    """Which inputs of a layer are pruned, (F,) bool."""

    pruned: Tensor

    def __init__(self, count: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("pruned", torch.zeros(count, dtype=torch.bool, device=device))

    @torch.no_grad()
    def cut(self, weight: Tensor) -> None:
        """Put 0 into the pruned columns of a weight (out, F, ...)."""
        weight[:, self.pruned] = 0


class FinePruning(SimpleDefence[FinePruningConfig]):
    """Fine-pruning."""

    name = "fine_pruning"
    config = FinePruningConfig
    needs_labels = True
    numbers = ("pruned_share",)

    def check(self, model: nn.Module, images: Tensor) -> None:
        with_reader(model, images)

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: FinePruningConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[FinePruningConfig]:
        """Prune, then fine-tune. A run goes on from the end of pruning, or of an epoch.

        Raises:
            ModelError: the model has no layer that reads features.
        """
        net, reader = with_reader(model, clean.images)
        net.requires_grad_(True)
        clean = CleanData(clean.images.to(weights_of(net)[0].dtype), clean.labels)
        learn, choose = split(clean, config.held_out, generator)
        weight = weight_of(net, reader)
        columns = Columns(weight.shape[1], clean.images.device)
        optimiser = sgd(net, config)

        def ending() -> tuple[dict[str, Tensor], dict[str, float]]:
            share = columns.pruned.float().mean().item()
            return net.state_dict(), {"pruned_share": share}

        with Loop(
            self,
            model,
            config,
            {"net": net, "columns": columns, "moments": optimiser},
            ending,
            generator=generator,
            device=clean.images.device,
            keeper=keeper,
        ) as loop:
            for _ in loop.epochs(1):
                order = activity(net, reader, learn.images, config.batch_size, loop.passes).argsort(
                    stable=True
                )
                prune(net, weight, columns, order, choose, config, loop.passes)
            net.train()
            for epoch in loop.epochs(config.epochs):
                set_lr(optimiser, config.lr * cosine(epoch, config.epochs))
                for images, labels in epoch_of(clean, config, generator, net):
                    loss = F.cross_entropy(logits_of(net, images), labels)
                    descend(optimiser, loss)
                    columns.cut(weight)
                    loop.passes.add(forward=1, backward=1)
                    if loop.step({"cross_entropy": loss.item()}, on_step):
                        return loop.result()
            return loop.result()


@torch.no_grad()
def with_reader(model: nn.Module, images: Tensor) -> tuple[nn.Module, str]:
    """A copy of the model that answers with logits, and the layer whose inputs are its features: the
    first linear layer after the last convolution that reads one row an image; the last of all where the
    model has no convolution; the last convolution where no such linear layer follows.

    Raises:
        ModelError: there is none, or it is a convolution of several groups.
    """
    net, names = admitted(model, images, (*CONVOLUTIONS, nn.Linear))
    with watched(net, names) as seen:
        net(images[:2].to(next(net.parameters()).dtype))
    found = [name for name in names if isinstance(net.get_submodule(name), CONVOLUTIONS)]
    behind = names[names.index(found[-1]) + 1 :] if found else names[-1:]
    rows = [name for name in behind if seen[name].inputs[0].ndim == 2]
    reader = rows[0] if rows else found[-1] if found else None
    if reader is None or getattr(net.get_submodule(reader), "groups", 1) > 1:
        raise ModelError(
            "Fine-pruning prunes the features that the last layers read, and this model reads them by "
            "no plain linear layer or convolution; take another defence, such as `ft_sam`."
        )
    return net, reader


@torch.no_grad()
def activity(net: nn.Module, reader: str, images: Tensor, batch_size: int, passes: Passes) -> Tensor:
    """The mean over images, and over places where there are any, of every input of a layer: (F,)."""
    total = torch.zeros((), dtype=torch.float64)
    for part in images.split(batch_size):
        with watched(net, [reader]) as seen:
            net(part)
        passes.add(forward=1, backward=0)
        features = seen[reader].inputs[0].cpu().double()
        total = total + features.reshape(*features.shape[:2], -1).mean(2).sum(0)
    return total / len(images)


def prune(
    net: nn.Module,
    weight: Tensor,
    columns: Columns,
    order: Tensor,
    choose: CleanData,
    config: FinePruningConfig,
    passes: Passes,
) -> None:
    """Cut columns in this order, until a further step would lose the share `max_drop` of the accuracy
    on `choose` or more; the net is left as before that step, with one column at least."""
    count = math.ceil(config.prune_step * len(order))
    passes.add(forward=1, backward=0)
    least = accuracy(net, choose) * (1 - config.max_drop)
    for first in range(0, len(order) - 1, count):
        step = order[first : min(first + count, len(order) - 1)].to(weight.device)
        kept = weight.detach()[:, step].clone()
        columns.pruned[step] = True
        columns.cut(weight)
        passes.add(forward=1, backward=0)
        if accuracy(net, choose) <= least:
            columns.pruned[step] = False
            with torch.no_grad():
                weight[:, step] = kept
            return
