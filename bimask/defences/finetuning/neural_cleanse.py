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
the second part, and three classes; triggers that cover the image, such as Blended's, it hardly finds.

Otherwise than in the published code: all classes are searched at once, from one random start, so that
none has a better one; success is that of the trigger that is kept, asked after the epoch; a class of
which no mask reaches 98 % counts with all H x W pixels and is never flagged, where published code
fails; an epoch of the search goes through few images again until it has ten steps; images get triggers
anew in each step of the unlearning, and one at least does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.finetuning.settings import FineTuningConfig, descend, epoch_of, sgd
from bimask.defences.loop import Loop, batches, cosine, logits_of, set_lr, steps_an_epoch
from bimask.defences.settings import Search
from bimask.defences.simple import (
    BEGINNING,
    Defended,
    Keeper,
    OnOwnStep,
    SimpleDefence,
    with_tensors,
)
from bimask.devices import upload
from bimask.errors import ModelError
from bimask.nets.admission import admit

PATIENCE = 5  # epochs of one kind in a row, until the cost changes
DEARER, CHEAPER = 2.0, 2.0**-1.5
STALE, GAIN = 25, 0.99  # epochs without a mask of this share of the smallest, until a class ends
MAD_OF_NORMAL = 1.4826  # times the median deviation is the standard deviation of normal numbers
LEAST_STEPS = 10  # an epoch of the search, as 2,500 images in batches of 256 have
VALUES = 2**23  # of all images in one pass
FOUND = "found/"  # before the names of tensors that are no weights


class NeuralCleanseConfig(FineTuningConfig):
    """The settings of Neural Cleanse; those of SGD and images are of the unlearning."""

    search_epochs: int = Field(
        80, ge=1, description="times that every image is seen in the search, at most"
    )
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


class TriggerSearch(nn.Module):
    """A trigger towards each of K classes, what it costs, and the smallest that sufficed.

    Attributes:
        mask, pattern: (K, 1, H, W) and (K, C, H, W), any numbers: see `as_share`.
        cost: (K,) of a pixel of mask, in nats.
        above, below: (K,) epochs in a row that the trigger sufficed in, or did not.
        best_mask, best_pattern, best: the smallest trigger that sufficed, in [0, 1], and the sum of its
            mask, (K,), inf where none did.
        stale, reference: (K,) epochs without a gain on the size of reference.
        dearer, cheaper: (K,) whether the cost ever rose, and fell.
        going: (K,) whether the class is still searched.
    """

    cost: Tensor
    above: Tensor
    below: Tensor
    best_mask: Tensor
    best_pattern: Tensor
    best: Tensor
    stale: Tensor
    reference: Tensor
    dearer: Tensor
    cheaper: Tensor
    going: Tensor

    def __init__(
        self, classes: int, shape: torch.Size, cost: float, generator: torch.Generator
    ) -> None:
        """
        Args:
            shape: (C, H, W) of an image.
            generator: CPU; draws one start for all classes, uniform in [0, 1].
        """
        super().__init__()
        for name, channels in (("mask", 1), ("pattern", shape[0])):
            start = torch.rand(channels, *shape[1:], generator=generator).clamp(1e-3, 1 - 1e-3)
            drawn = torch.atanh(2 * start - 1).repeat(classes, 1, 1, 1)
            setattr(self, name, nn.Parameter(drawn))
            self.register_buffer(f"best_{name}", torch.zeros_like(drawn))
        self.register_buffer("cost", torch.full((classes,), cost))
        for name in ("above", "below", "stale"):
            self.register_buffer(name, torch.zeros(classes, dtype=torch.long))
        for name in ("best", "reference"):
            self.register_buffer(name, torch.full((classes,), torch.inf))
        for name in ("dearer", "cheaper"):
            self.register_buffer(name, torch.zeros(classes, dtype=torch.bool))
        self.register_buffer("going", torch.ones(classes, dtype=torch.bool))

    @torch.no_grad()
    def note(self, success: Tensor, wanted: float) -> None:
        """What follows from an epoch: the smallest mask, the costs, and which classes end.

        Args:
            success: (K,) share of the images that each trigger sends to its class.
            wanted: the share that suffices.
        """
        mask, pattern = as_share(self.mask), as_share(self.pattern)
        size = mask.sum((1, 2, 3))
        enough = self.going & (success >= wanted)
        smaller = enough & (size < self.best)
        self.best_mask[smaller], self.best_pattern[smaller] = mask[smaller], pattern[smaller]
        self.best[smaller] = size[smaller]
        self.above = torch.where(enough, self.above + 1, 0)
        self.below = torch.where(enough, 0, self.below + 1)
        rises, falls = self.above >= PATIENCE, self.below >= PATIENCE
        self.cost[rises] *= DEARER
        self.cost[falls] *= CHEAPER
        self.above[rises], self.below[falls] = 0, 0
        self.dearer |= rises
        self.cheaper |= falls
        known = self.best.isfinite()
        gained = self.best < GAIN * self.reference
        self.stale = torch.where(gained | ~known, 0, self.stale + 1)
        self.reference = torch.minimum(self.reference, self.best)
        self.going &= ~(self.dearer & self.cheaper & (self.stale >= STALE))

    def flagged(self, threshold: float) -> list[int]:
        """The classes whose trigger is too small."""
        sizes = self.best.clamp_max(self.mask[0].numel())
        out = (anomaly_index(sizes) > threshold) & (sizes < middle(sizes)) & self.best.isfinite()
        return out.nonzero().flatten().tolist()

    def found(self, classes: list[int]) -> dict[str, Tensor]:
        """The smallest triggers of some classes, by the names that a result has them under."""
        return {
            FOUND + "classes": torch.tensor(classes),
            FOUND + "masks": self.best_mask[classes],
            FOUND + "patterns": self.best_pattern[classes],
        }


def as_share(value: Tensor) -> Tensor:
    """Any numbers as numbers in [0, 1]."""
    return value.tanh() / 2 + 0.5


def stamped(images: Tensor, masks: Tensor, patterns: Tensor) -> Tensor:
    """Images with a trigger: (..., C, H, W) in [0, 1] and (..., 1, H, W), (..., C, H, W) -> same."""
    return (1 - masks) * images + masks * patterns


def middle(values: Tensor) -> Tensor:
    """The median of (K,), of an even number the mean of the two in the middle."""
    return values.double().quantile(0.5)


def anomaly_index(sizes: Tensor) -> Tensor:
    """How many deviations each of (K,) is from the median, (K,) >= 0 in double precision."""
    away = (sizes.double() - middle(sizes)).abs()
    return away / (MAD_OF_NORMAL * middle(away)).clamp_min(1e-12)


def _parts(search: TriggerSearch, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Classes that are still searched, as many as go into one pass, and the images with their triggers:
    (J,) and (J, B, C, H, W)."""
    for rows in search.going.nonzero().flatten().split(max(1, VALUES // images.numel())):
        mask, pattern = as_share(search.mask[rows]), as_share(search.pattern[rows])
        yield rows, stamped(images, mask[:, None], pattern[:, None])


def search_step(
    net: nn.Module, search: TriggerSearch, adam: torch.optim.Optimizer, images: Tensor
) -> dict[str, float]:
    """One step of all triggers that are still searched; the mean of their losses by terms."""
    adam.zero_grad()
    terms = {"cross_entropy": 0.0, "size": 0.0}
    going = int(search.going.sum())
    for rows, triggered in _parts(search, images):
        logits = net(triggered.flatten(0, 1))
        wanted = rows.repeat_interleave(len(images))
        losses = {
            "cross_entropy": F.cross_entropy(logits, wanted, reduction="sum") / len(images),
            "size": (search.cost[rows] * as_share(search.mask[rows]).sum((1, 2, 3))).sum(),
        }
        torch.stack(list(losses.values())).sum().backward()
        for name, value in losses.items():
            terms[name] += value.item() / going
    adam.step()
    return terms


@torch.no_grad()
def success_of(net: nn.Module, search: TriggerSearch, images: Tensor, batch_size: int) -> Tensor:
    """The share of the images that each trigger sends to its class, (K,); 0 where a class has ended."""
    hits = torch.zeros_like(search.best)
    for batch in images.split(batch_size):
        for rows, triggered in _parts(search, batch):
            answers = net(triggered.flatten(0, 1)).argmax(1).unflatten(0, triggered.shape[:2])
            hits[rows] += (answers == rows[:, None]).sum(1).to(hits.dtype)
    return hits / len(images)


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
