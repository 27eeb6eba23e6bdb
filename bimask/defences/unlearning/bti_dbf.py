"""BTI-DBF (U): invert the trigger through features that the clean task does not use, and unlearn it.

Xu, Huang, Li, Qin, Ren, "Towards Reliable and Efficient Backdoor Trigger Inversion via Decoupling
Benign Features", ICLR 2024 (openreview Tw9wemV6cb); this is its variant U, which unlearns. The suspect
is parted into features f and a head h. A generator G of changed images first learns the identity. Then
a round has three phases, with x images, y labels and m a factor in [0, 1] on every feature:

    mask       min over m of CE(h(m f(x)), y) - CE(h((1 - m) f(x)), y)
    generator  min over G of MSE(m f(G(x)), m f(x)) - MSE((1 - m) f(G(x)), (1 - m) f(x))
               + max(0, MSE(f(G(x)), f(x)) - t), and from the second round CE(h(f(G(x))), target)
    unlearn    min over the weights of CE(h(f(x')), y) + MSE(f(G(x)), features of x in the suspect)

x' is a batch of which a tenth went through G, and the MSE is over that tenth. The target is the class
that most G(x) were answered with in the round before.

Use it where the trigger may change from image to image, since G sees the image.
It costs 450 epochs of up to two passes a batch, and as many of the generator.
It needs labels, and a net whose logits come straight from a linear layer: that is where it is parted.

The published program knows the parts of four architectures, takes logits that went through softmax
twice for the identity, and stops its phase early. Its bound of 0.3 on the image's change holds for
normalised images; here pixels are in [0, 1], and a change is scaled back to the bound, not punished
beyond it. Batch norms answer with their running statistics throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.defences.base import CleanData
from bimask.defences.loop import Loop, batches, steps_an_epoch
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.sgd import BatchSize, Flip, Shift, weights_of
from bimask.defences.simple import (
    BEGINNING,
    Defended,
    Keeper,
    OnOwnStep,
    SimpleDefence,
)
from bimask.defences.unlearning.decoupling import (
    FeatureMask,
    Losses,
    Parted,
    descend,
    identity_losses,
    inversion_losses,
    mask_losses,
)
from bimask.defences.unlearning.unet import ImageChanger
from bimask.masking.copies import copied
from bimask.nets.admission import admit


class BtiDbfConfig(DefenceConfig):
    """The settings of BTI-DBF (U), as its authors' program has them."""

    lr: Annotated[
        float, Field(gt=0, description="of Adam, on the weights"), Search(1e-5, 1e-2, log=True)
    ] = 1e-4
    epochs: Annotated[
        int, Field(ge=1, description="times that a round unlearns on every image"), Search(5, 100)
    ] = 30
    rounds: Annotated[
        int, Field(ge=1, description="of a mask, an inversion and unlearning"), Search(1, 5)
    ] = 5
    batch_size: BatchSize = 128
    pretrain_epochs: int = Field(50, ge=0, description="in which the generator learns the identity")
    mask_epochs: int = Field(20, ge=1, description="of the mask, a round")
    mask_lr: Annotated[
        float, Field(gt=0, description="of Adam, on the mask"), Search(0.01, 0.3, log=True)
    ] = 0.01
    generator_epochs: int = Field(30, ge=1, description="of the generator, a round")
    generator_lr: float = Field(1e-3, gt=0, description="of Adam, on the generator")
    width: int = Field(32, ge=1, description="channels of the generator's first level")
    # 0.3 of normalised images, whose standard deviation in [0, 1] is about a quarter
    image_bound: Annotated[
        float,
        Field(gt=0, description="largest mean square of an image's change, of pixels in [0, 1]"),
        Search(0.005, 0.1, log=True),
    ] = 0.02
    feature_bound: float = Field(
        3.0, ge=0, description="t, the mean square of the features' change beyond which it is punished"
    )
    patched_share: float = Field(
        0.1, ge=0, lt=1, description="of a batch that goes through the generator, and one image more"
    )
    shift: Shift = 0
    flip: Flip = False

    def steps(self, images: int) -> int:
        """Batches over all phases."""
        epochs = self.mask_epochs + self.generator_epochs + self.epochs
        return (self.pretrain_epochs + self.rounds * epochs) * steps_an_epoch(images, self.batch_size)


class BtiDbf(SimpleDefence[BtiDbfConfig]):
    """Trigger inversion by decoupling benign features, with unlearning."""

    name = "bti_dbf"
    config = BtiDbfConfig
    needs_labels = True
    numbers = ("inverted_share",)  # of images that the last inverted trigger takes to one class

    def check(self, model: nn.Module, images: Tensor) -> None:
        Parted(admit(model, images).model, images)

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: BtiDbfConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[BtiDbfConfig]:
        """Train all weights, from phase to phase. Epochs of any phase are what a run goes on from.

        Raises:
            ModelError: the net has no linear layer that its logits come from.
        """
        run = _Run(admit(model, clean.images).model, clean, config, generator)
        with Loop(
            self,
            model,
            config,
            run.parts(),
            lambda: (run.net.state_dict(), {"inverted_share": float(run.found.share)}),
            generator=generator,
            device=clean.images.device,
            keeper=keeper,
        ) as loop:
            for passes, losses in run.steps(loop):
                loop.passes.add(*passes)
                if loop.step(losses, on_step):
                    return loop.result()
            return loop.result()


class _Found(nn.Module):
    """What the last inversion led to: the class, -1 before there is one, and the share of images."""

    target: Tensor
    share: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("target", torch.tensor(-1))
        self.register_buffer("share", torch.tensor(0.0))


Logged = tuple[tuple[int, int], dict[str, float]]  # passes forward and backward; losses


class _Run:
    """The phases of one configuration, and what changes in them."""

    def __init__(
        self, net: nn.Module, clean: CleanData, config: BtiDbfConfig, generator: torch.Generator
    ) -> None:
        self.net, self.clean, self.config, self.draws = (
            net.requires_grad_(True),
            clean,
            config,
            generator,
        )
        self.parted = Parted(net, clean.images)
        self.suspect = Parted(copied(net).requires_grad_(False), clean.images)
        weights = weights_of(net)
        self.dtype = weights[0].dtype
        channels = clean.images.shape[1]
        changer = ImageChanger(channels, config.width, config.image_bound, generator)
        self.changer = changer.to(weights[0])
        self.mask = FeatureMask(self.parted.head.in_features).to(weights[0])
        self.found = _Found().to(clean.images.device)
        self.on_net = torch.optim.Adam(weights, config.lr)
        self.on_changer = torch.optim.Adam(self.changer.parameters(), config.generator_lr)
        self.on_mask = torch.optim.Adam(self.mask.parameters(), config.mask_lr)

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "net": self.net,
            "changer": self.changer,
            "mask": self.mask,
            "found": self.found,
            "net_moments": self.on_net,
            "changer_moments": self.on_changer,
            "mask_moments": self.on_mask,
        }

    def steps(self, loop: Loop[BtiDbfConfig]) -> Iterator[Logged]:
        """All steps, each after it was taken. What begins a phase stands in its first epoch, so that a
        run that goes on within it does not begin it anew."""
        config = self.config
        for _ in loop.epochs(config.pretrain_epochs):
            for images, _ in self._batches():
                losses = identity_losses(self.changer, self.parted, images)
                yield (2, 1), descend(self.on_changer, losses)
        for turn in range(config.rounds):
            for epoch in loop.epochs(config.mask_epochs):
                if epoch == 0:
                    self.mask.reset()
                    self.on_mask.state.clear()
                for images, labels in self._batches():
                    with torch.no_grad():
                        features, _ = self.parted(images)
                    losses = mask_losses(self.parted, self.mask(), features, labels)
                    yield (1, 0), descend(self.on_mask, losses)
            for epoch in loop.epochs(config.generator_epochs):
                if epoch == 0:
                    self.on_changer.state.clear()
                for images, _ in self._batches():
                    losses = self._inversion_losses(images, aimed=turn > 0)
                    yield (2, 1), descend(self.on_changer, losses)
            for epoch in loop.epochs(config.epochs):
                if epoch == 0:
                    self.on_net.state.clear()
                    self._look()
                for images, labels in self._batches():
                    yield (2, 1), descend(self.on_net, self._unlearning_losses(images, labels))

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(
            self.clean,
            self.config.batch_size,
            self.draws,
            shift=self.config.shift,
            flip=self.config.flip,
            dtype=self.dtype,
        )

    def _inversion_losses(self, images: Tensor, *, aimed: bool) -> Losses:
        with torch.no_grad():
            clean, _ = self.parted(images)
            mask = self.mask()
        changed, logits = self.parted(self.changer(images))
        losses = inversion_losses(mask, clean, changed, self.config.feature_bound)
        if aimed:
            losses["target"] = F.cross_entropy(logits, self.found.target.expand(len(images)))
        return losses

    def _unlearning_losses(self, images: Tensor, labels: Tensor) -> Losses:
        count = min(int(self.config.patched_share * len(images)) + 1, len(images))
        with torch.no_grad():
            wanted, _ = self.suspect(images[:count])
            changed = self.changer(images[:count])
        features, logits = self.parted(torch.cat([changed, images[count:]]))
        return {
            "cross_entropy": F.cross_entropy(logits, labels),
            "features": F.mse_loss(features[:count], wanted),
        }

    @torch.no_grad()
    def _look(self) -> None:
        """Which class most changed images are given."""
        parts = self.clean.images.to(self.dtype).split(512)
        answers = torch.cat([self.parted(self.changer(part))[1].argmax(1) for part in parts])
        counts = answers.bincount()
        self.found.target.copy_(counts.argmax())
        self.found.share.copy_(counts.max() / len(answers))
