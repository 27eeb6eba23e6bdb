"""Neural Cleanse with unlearning: the smallest trigger towards every class, and which is too small.

Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating Backdoor
Attacks in Neural Networks", IEEE S&P 2019. For each class k a mask m (H, W) and a pattern p (C, H, W),
both tanh(.) / 2 + 1/2, are learned to send all images there at the least size (equations 2 and 3):

    CE(f((1 - m) x + m p), k) + cost_k sum m

cost_k doubles after 5 epochs in a row in which 98 % of the images went to k, and is divided by 2^1.5
after 5 in which they did not; the smallest mask of the first kind is kept. A class ends when its mask
has not shrunk by 1 % in 25 epochs and its cost has been both raised and lowered. A class is flagged
whose sum of m is under the median of all and has an anomaly index |sum m - median| / (1.4826 MAD) above
2, MAD being the median of |sum m - median| (section IV.C). If there are such classes, the model is
fine-tuned with their triggers on a fifth of the images, which keep their labels (section VI.C); else it
is left as it is, and `found` is 0.

Use it against small patches that lead all images to one class. It costs a search with the images of an
epoch times the classes in every epoch, and plain fine-tuning if a class is flagged. It needs labels for
the second part, and three classes. The search is for a region, so a trigger that differs from image to
image is none of its own.

Otherwise than in the published code: all classes are searched at once, from one random start, so that
none has a better one; success is that of the trigger that is kept, asked after the epoch; a class of
which no mask reaches 98 % counts with all H x W pixels and is never flagged, where published code
fails; an epoch of the search goes through few images again until it has ten steps; images get triggers
anew in each step of the unlearning, and one at least does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.loop import Loop, batches, cosine, logits_of, set_lr, steps_an_epoch
from bimask.defences.settings import Search
from bimask.defences.sgd import FineTuningConfig, descend, epoch_of, sgd
from bimask.defences.simple import (
    BEGINNING,
    Defended,
    Keeper,
    OnOwnStep,
    SimpleDefence,
    with_tensors,
)
from bimask.defences.unlearning.trigger_search import (
    FOUND,
    TriggerSearch,
    search_step,
    stamped,
    success_of,
)
from bimask.devices import upload
from bimask.errors import ModelError
from bimask.nets.admission import admit

LEAST_STEPS = 10  # an epoch of the search, as 2,500 images in batches of 256 have


class NeuralCleanseConfig(FineTuningConfig):
    """The settings of Neural Cleanse; those of SGD and images are of the unlearning."""

    search_epochs: Annotated[
        int,
        Field(ge=1, description="times that every image is seen in the search, at most"),
        Search(10, 80, log=True),
    ] = 80
    search_batch_size: int = Field(32, ge=1, description="images a step of the search, for each class")
    search_lr: float = Field(0.1, gt=0, description="of Adam in the search, with betas 0.5 and 0.9")
    cost: Annotated[
        float,
        Field(gt=0, description="of a pixel of mask in the first epoch, in nats"),
        Search(1e-4, 1e-1, log=True),
    ] = 1e-3
    min_success: float = Field(
        0.98, ge=0, le=1, description="share of the images that a trigger must send to its class"
    )
    anomaly: Annotated[
        float,
        Field(ge=0, description="anomaly index above which a class is flagged, in deviations"),
        Search(1.0, 4.0),
    ] = 2.0
    triggered_share: Annotated[
        float,
        Field(gt=0, le=1, description="share of a batch that gets a found trigger in the unlearning"),
        Search(0.05, 0.5),
    ] = 0.2

    def steps(self, images: int) -> int:
        """Batches over all epochs of search and unlearning, if no class ends and one is flagged."""
        return self.search_epochs * self.rounds(images)[1] + super().steps(images)

    def rounds(self, images: int) -> tuple[int, int]:
        """How often an epoch of the search goes through all images, and its steps."""
        steps = steps_an_epoch(images, self.search_batch_size)
        times = -(-LEAST_STEPS // steps)
        return times, times * steps


class NeuralCleanse(SimpleDefence[NeuralCleanseConfig]):
    """Neural Cleanse with unlearning."""

    name = "neural_cleanse"
    config = NeuralCleanseConfig
    needs_labels = True
    numbers = ("found",)
    ends_early = True

    def check(self, model: nn.Module, images: Tensor) -> None:
        _admitted(model, images)

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: NeuralCleanseConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[NeuralCleanseConfig]:
        """Search a trigger towards every class; unlearn those of classes that are flagged.

        Raises:
            ModelError: the model has fewer than three classes.
        """
        net, classes = _admitted(model, clean.images)
        net.requires_grad_(False)
        like = next(net.parameters())
        search = TriggerSearch(classes, clean.images.shape[1:], config.cost, generator).to(like)
        adam = torch.optim.Adam(search.parameters(), config.search_lr, betas=(0.5, 0.9))
        optimiser = sgd(net, config)
        flagged: list[int] = []

        def ending() -> tuple[dict[str, Tensor], dict[str, float]]:
            found = search.found(flagged) if flagged else {}
            return (net.state_dict() | found if found else {}), {"found": float(bool(found))}

        with Loop(
            self,
            model,
            config,
            {"net": net, "moments": optimiser, "search": search, "adam": adam},
            ending,
            generator=generator,
            device=clean.images.device,
            keeper=keeper,
        ) as loop:
            for _ in loop.epochs(config.search_epochs):
                if not search.going.any():
                    break
                asked = int(search.going.sum())
                for _ in range(config.rounds(len(clean.images))[0]):
                    for images, _ in batches(
                        clean, config.search_batch_size, generator, dtype=like.dtype
                    ):
                        terms = search_step(net, search, adam, images)
                        loop.passes.add(forward=asked, backward=asked)
                        if loop.step(terms, on_step):
                            return loop.result()
                success = success_of(net, search, clean.images.to(like.dtype), config.batch_size)
                again = asked * steps_an_epoch(len(clean.images), config.batch_size)
                loop.passes.add(forward=again, backward=0)
                search.note(success, config.min_success)
            flagged += search.flagged(config.anomaly)
            if not flagged:
                return loop.result()
            net.train().requires_grad_(True)
            triggers = search.found(flagged)
            masks, patterns = triggers[FOUND + "masks"], triggers[FOUND + "patterns"]
            for epoch in loop.epochs(config.epochs):
                set_lr(optimiser, config.lr * cosine(epoch, config.epochs))
                for images, labels in epoch_of(clean, config, generator, net):
                    count = max(1, round(config.triggered_share * len(images)))
                    drawn = torch.randint(len(flagged), (count,), generator=generator)
                    which = upload(drawn, images)
                    # batches are in random order, so the first are any
                    shown = torch.cat(
                        [stamped(images[:count], masks[which], patterns[which]), images[count:]]
                    )
                    loss = F.cross_entropy(logits_of(net, shown), labels)
                    descend(optimiser, loss)
                    loop.passes.add(forward=1, backward=1)
                    if loop.step({"cross_entropy": loss.item()}, on_step):
                        return loop.result()
            return loop.result()

    def restore(
        self, model: nn.Module, tensors: Mapping[str, Tensor], config: NeuralCleanseConfig
    ) -> nn.Module:
        """A copy of the model with these weights; of the model as it is where nothing was found."""
        weights = {name: value for name, value in tensors.items() if not name.startswith(FOUND)}
        return with_tensors(model, weights)

    def synthesised(
        self,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        images: Tensor,
        config: NeuralCleanseConfig,
    ) -> dict[str, Tensor]:
        """What a found trigger changes of each image, of several triggers one after the other; nothing
        where none was found."""
        if FOUND + "masks" not in tensors:
            return {}
        masks, patterns = (tensors[FOUND + name].to(images) for name in ("masks", "patterns"))
        which = torch.arange(len(images), device=images.device) % len(masks)
        return {"each": stamped(images, masks[which], patterns[which]) - images}


def _admitted(model: nn.Module, images: Tensor) -> tuple[nn.Module, int]:
    """The net in the model, in eval mode, and its number of classes."""
    net = admit(model, images).model
    with torch.no_grad():
        classes = net(images[:1].to(next(net.parameters()).dtype)).shape[1]
    if classes < 3:
        raise ModelError(
            f"Neural Cleanse compares classes with each other, and this model has {classes}, of which "
            "none can stand apart; take another defence, such as `ft_sam`."
        )
    return net, classes
