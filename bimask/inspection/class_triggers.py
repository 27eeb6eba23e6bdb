"""Universal triggers towards every class of a suspect model, from clean images alone.

For each class k one trigger T_k is searched that sends the images of all other classes there, and what
it costs is the class's price (in the spirit of Neural Cleanse, Wang et al. 2019, section IV):

    price_k = min over T of   mean over {i: f(x_i) != k} of CE(f(T(x_i)), k)  +  weight * size(T)

A backdoor is a short cut: the class it leads to is cheap. Labels are the model's own answers. A
backdoor that leads each class to another (all-to-all) makes no class cheap, but it makes a trigger
cheap that leads images anywhere else. The price of such a trigger has -log(1 - p(f(x_i))) in place of
CE, and `ANY` in place of k. The families:

    patch     T(x) = (1 - m) x + m p     size = sum of m, the pixels covered; m (H, W), p (C, H, W)
    pattern   T(x) = clip(x + d)         size = sum of d^2
    warp      T(x)(z) = x(z + g(z))      size = mean of |g|^2 in pixels; g of 4x4 points, bicubic
    tone      T(x)(z) = x(z) + h(x(z))   size = mean of h^2; h of a channel linear between 17 points
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from bimask.devices import fast_bfloat16
from bimask.errors import DataError
from bimask.masking.copies import copied
from bimask.masking.discovery import candidates
from bimask.masking.frozen import FrozenNet
from bimask.masking.masks import MaskSet

Family = Literal["patch", "pattern", "warp", "tone"]

IMAGES_PER_PASS = 2048  # classes x images in one pass
ANY = -1  # in place of a class: any but the image's own


class TriggerFamily(nn.Module):
    """One trigger for each of K classes; parameters have K rows.

    Class attributes:
        weight: of the size in the price, for images in [0, 1].
        lr, steps: of Adam.
    """

    weight: ClassVar[float]
    lr: ClassVar[float]
    steps: ClassVar[int]

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (K, N, C, H, W) in [0, 1]."""

    @abstractmethod
    def size(self) -> Tensor:
        """(K,) >= 0."""


class Patch(TriggerFamily):
    """A region of pixels is replaced."""

    weight, lr, steps = 0.05, 0.3, 60

    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.cover = nn.Parameter(torch.full((classes, 1, 1, *shape[1:]), -2.0))
        self.paint = nn.Parameter(torch.zeros(classes, 1, *shape))

    def forward(self, images: Tensor) -> Tensor:
        cover = self.cover.sigmoid()
        return (1 - cover) * images + cover * self.paint.sigmoid()

    def size(self) -> Tensor:
        return self.cover.sigmoid().sum((1, 2, 3, 4))


class Pattern(TriggerFamily):
    """One picture is added to all images."""

    weight, lr, steps = 0.5, 0.03, 40

    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.added = nn.Parameter(torch.zeros(classes, 1, *shape))

    def forward(self, images: Tensor) -> Tensor:
        return (images + self.added).clamp(0, 1)

    def size(self) -> Tensor:
        return self.added.square().sum((1, 2, 3, 4))


class Warp(TriggerFamily):
    """All images are bent alike."""

    weight, lr, steps = 0.3, 0.1, 30
    points = 4

    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        # off the identity, where the gradient of bilinear sampling jumps; the same for every class
        start = torch.randn(2, self.points, self.points, generator=torch.Generator().manual_seed(0))
        self.moved = nn.Parameter(0.01 * start.expand(classes, -1, -1, -1).clone())

    def forward(self, images: Tensor) -> Tensor:
        n, channels, height, width = images.shape
        classes = len(self.moved)
        pixel = 2 / (images.new_tensor([width, height]) - 1)  # in coordinates from -1 to 1
        field = F.interpolate(self.moved, (height, width), mode="bicubic", align_corners=True)
        y, x = torch.meshgrid(
            *(torch.linspace(-1, 1, side).to(images) for side in (height, width)), indexing="ij"
        )
        grid = torch.stack([x, y], -1) + field.permute(0, 2, 3, 1) * pixel
        # all images of a class lie in the channels, so that they share one grid
        stacked = images.reshape(1, n * channels, height, width).expand(classes, -1, -1, -1)
        bent = F.grid_sample(stacked, grid.clamp(-1, 1), align_corners=True)
        return bent.view(classes, n, channels, height, width)

    def size(self) -> Tensor:
        return self.moved.square().sum(1).mean((1, 2))


class Tone(TriggerFamily):
    """All pixels of a brightness get another one: filters, fewer grey levels."""

    weight, lr, steps = 30.0, 0.02, 40
    levels = 16

    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(classes, shape[0], self.levels + 1))

    def forward(self, images: Tensor) -> Tensor:
        place = images * self.levels
        low = place.long().clamp(0, self.levels - 1)
        channel = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
        below, above = self.offset[:, channel, low], self.offset[:, channel, low + 1]
        return (images + torch.lerp(below, above, place - low)).clamp(0, 1)

    def size(self) -> Tensor:
        return self.offset.square().mean((1, 2))


FAMILIES: dict[Family, type[TriggerFamily]] = {
    "patch": Patch,
    "pattern": Pattern,
    "warp": Warp,
    "tone": Tone,
}


@dataclass(frozen=True)
class ClassTriggers:
    """The triggers of one family, one for each of K classes.

    Attributes:
        family: its name.
        price: (K,), see the module; inf for a class that all images are of.
        success: (K,) share of the images of other classes that it sends there.
        made: the triggers.
    """

    family: Family
    price: Tensor
    success: Tensor
    made: TriggerFamily

    @torch.no_grad()
    def apply(self, images: Tensor) -> Tensor:
        """Every class's trigger on every image: (N, C, H, W) in [0, 1] -> (K, N, C, H, W)."""
        return cast(Tensor, self.made(images))

    @torch.no_grad()
    def apply_each(self, images: Tensor, rows: Tensor) -> Tensor:
        """On each image the trigger of its class: (N, C, H, W), (N,) in [0, K) -> (N, C, H, W)."""

        def one(trigger: dict[str, Tensor], image: Tensor) -> Tensor:
            return cast(Tensor, functional_call(self.made, trigger, (image[None],)))[0, 0]

        chosen = {name: value[rows, None] for name, value in self.made.named_parameters()}
        return vmap(one)(chosen, images)

    def of(self, rows: Tensor) -> ClassTriggers:
        """Those of some classes alone, (J,) in [0, K)."""
        made = _stacked([self.made], rows)
        return replace(self, price=self.price[rows], success=self.success[rows], made=made)

    def to(self, device: torch.device | str) -> ClassTriggers:
        """The same on another device."""
        return replace(self, made=copy.deepcopy(self.made).to(device))


def find_class_triggers(
    model: nn.Module,
    images: Tensor,
    family: Family,
    *,
    towards: Tensor | None = None,
    on_step: Callable[[], None] | None = None,
) -> ClassTriggers:
    """The triggers of a family, towards every class of `model`; the same call gives the same triggers.

    Costs `steps` forward and backward passes of K x N images.

    Args:
        model: images in [0, 1] -> logits (N, K), in eval mode; it is left as it is. Several searches on
            one model share what `prepared` makes of it.
        images: (N, C, H, W) in [0, 1], clean, of the model's device, and best of all classes.
        towards: the classes, (K',), among them `ANY`; None for all but that.
        on_step: called after each of `steps_of(family, K', N)` steps.

    Raises:
        DataError: no images.
    """
    if not len(images):
        raise DataError("Triggers need at least one clean image, got none.")
    model = prepared(model, images)
    with torch.no_grad():
        logits = model(images)
    answers = logits.argmax(1)
    if towards is None:
        towards = torch.arange(logits.shape[1], device=images.device)
    prices: list[Tensor] = []
    successes: list[Tensor] = []
    parts: list[TriggerFamily] = []
    for chunk in towards.split(_classes_at_once(len(images))):
        triggers = FAMILIES[family](len(chunk), tuple(images.shape[1:])).to(images)
        price, success = _search(model, images, triggers, chunk, answers, on_step)
        prices.append(price)
        successes.append(success)
        parts.append(triggers)
    return ClassTriggers(family, torch.cat(prices), torch.cat(successes), _stacked(parts))


def prepared(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy of a model that is quick to ask and to take gradients of images through: batch norms
    folded away, channels_last and bfloat16 where model and device bear them.

    Args:
        model: images -> logits, in eval mode; left as it is.
        images: (N, C, H, W), some of those that it will be asked.
    """
    if isinstance(model, FrozenNet):
        return model
    sample = images[:8]
    sites = {site.key: site.channels for site in candidates(model, sample)}
    if not sites:
        return copied(model).requires_grad_(False)
    low = images.dtype == torch.float32 and fast_bfloat16(images.device)
    return FrozenNet(model, MaskSet(sites), sample=sample, dtype=torch.bfloat16 if low else None)


def steps_of(family: Family, classes: int, images: int) -> int:
    """How often `on_step` is called."""
    return FAMILIES[family].steps * -(-classes // _classes_at_once(images))


def _stacked(parts: Sequence[TriggerFamily], rows: Tensor | slice = slice(None)) -> TriggerFamily:
    """Triggers of several in a row, or some of those; they ask for no gradient."""
    made = copy.deepcopy(parts[0])
    for name, _ in parts[0].named_parameters():
        value = torch.cat([part.get_parameter(name).detach() for part in parts])[rows]
        setattr(made, name, nn.Parameter(value, requires_grad=False))
    return made


def _classes_at_once(images: int) -> int:
    return max(1, IMAGES_PER_PASS // images)


def _search(
    model: nn.Module,
    images: Tensor,
    triggers: TriggerFamily,
    targets: Tensor,
    answers: Tensor,
    on_step: Callable[[], None] | None,
) -> tuple[Tensor, Tensor]:
    """Learn `triggers` towards `targets` (K',); returns price and success, (K',) each."""
    others = (answers != targets[:, None]).to(images)  # (K', N): the images that count
    share = others / others.sum(1, keepdim=True).clamp_min(1)
    adam = torch.optim.Adam(triggers.parameters(), lr=triggers.lr)

    def costs() -> tuple[Tensor, Tensor]:
        logits = model(triggers(images).flatten(0, 1)).unflatten(0, others.shape)
        classes = torch.arange(logits.shape[2], device=logits.device)
        wanted = (classes == targets[:, None, None]).expand_as(logits)
        elsewhere = (classes != answers[:, None]) & (targets == ANY)[:, None, None]
        led = wanted | elsewhere
        loss = logits.logsumexp(2) - logits.masked_fill(~led, -torch.inf).logsumexp(2)
        hits = led.gather(2, logits.argmax(2, keepdim=True)).squeeze(2)
        return (loss * share).sum(1) + triggers.weight * triggers.size(), (hits * share).sum(1)

    for _ in range(triggers.steps):
        # gradients of the triggers alone: the model may be shared and keeps none
        gradients = torch.autograd.grad(costs()[0].sum(), list(triggers.parameters()))
        for parameter, gradient in zip(triggers.parameters(), gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        if on_step is not None:
            on_step()
    with torch.no_grad():
        price, success = costs()
    return price.masked_fill(~others.bool().any(1), torch.inf), success
