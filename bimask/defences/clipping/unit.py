"""UNIT: activations are cut off as tightly as the accuracy on clean images allows.

Cheng, Shen, Zhang, Tao, An, Guo, Ma, Zhang, "UNIT: Backdoor Mitigation via Automated Neural
Distribution Tightening", ECCV 2024 (arXiv 2407.11372). A trigger drives some neurons beyond what clean
images do. Every activation v gets a bound b, and min(v, b) goes on. The bounds begin at

    b = mean + 4 std,    of v over the clean images

and follow Adam on

    CE(net with bounds) + c sum over layers of mean(b)

where c doubles after 5 steps in a row whose accuracy on clean validation images is within the budget,
and is divided by 2^1.5 after 5 steps in a row whose accuracy is not: the schedule of Neural Cleanse.
The result has the tightest bounds that were within the budget. No weight of the net changes.

Use it against triggers that ride on large activations, such as patches and blended pictures. It costs
a pass forward and back, and one over the validation images, a step. It needs labels, and it spends the
accuracy that it is allowed; triggers whose activations look like clean ones stay.

We do otherwise, unless `faithful` is asked for: the bounds that are kept are those whose accuracy was
measured, not the ones of the step before; images are augmented anew in each step, not once. Held-out
images are few, so accuracy must be within the budget on them and on those that are learned on. Where
no step is within the budget, the result has the bounds of the beginning, not the last ones, and a
warning is given. The published code sets its counter of good steps to 0 one step late, which makes no
difference. The profile `scaled` is ours: a bound a channel, so that images of another size can be
answered, and k of b = mean + k std is learned. It tightens further and costs more: on digits, with
ten images a class, seven to ten points of accuracy where bounds a position cost one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bimask.data import augment
from bimask.defences.base import CleanData
from bimask.defences.clipping.activations import Granularity
from bimask.defences.clipping.bounds import (
    Learned,
    bounded_net,
    clipped_share,
    hold_above_zero,
    places_of,
    size_of,
)
from bimask.defences.clipping.schedule import CostSchedule
from bimask.defences.held_out import accuracy, split
from bimask.defences.loop import Loop
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.simple import BEGINNING, Defended, Keeper, OnOwnStep, SimpleDefence
from bimask.devices import upload
from bimask.errors import warn
from bimask.masking.copies import copied
from bimask.masking.inserted import ActivationBound, put_around
from bimask.masking.sites import like
from bimask.nets.admission import admit, unwrapped

HELD_OUT = 0.2  # of the images: the source's
MOST_CHECKED = 500  # images that accuracy is measured on, each step


class UnitConfig(DefenceConfig):
    """The settings of UNIT."""

    PROFILES: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "faithful": {"faithful": True},
        # 300 steps of that rate reach 15 deviations, so that the whole range is in reach
        "scaled": {"granularity": "channel", "parametrisation": "scaled", "bound_lr": 0.05},
    }
    granularity: Granularity = Field(
        "position",
        description="whether a bound is one of a position or one of a channel, as images of another "
        "size than the defender's need",
    )
    parametrisation: Literal["absolute", "scaled"] = Field(
        "absolute",
        description="whether a bound is learned as it is, or in standard deviations, so that a rate "
        "means the same for activations of every scale (ours)",
    )
    deviations: Annotated[
        float,
        Field(ge=0, description="standard deviations above the mean that a bound begins at"),
        Search(1.0, 6.0),
    ] = 4.0
    bound_lr: Annotated[
        float,
        Field(gt=0, description="of Adam: what a step moves a bound by, or its deviations if scaled"),
        Search(1e-4, 1e-1, log=True),
    ] = 1e-3
    iterations: Annotated[int, Field(ge=1, description="steps of Adam"), Search(50, 400, log=True)] = (
        300
    )
    accuracy_drop: float = Field(
        0.03, ge=0, le=1, description="accuracy on clean validation images that the bounds may cost"
    )
    cost: Annotated[
        float,
        Field(gt=0, description="weight of the bounds in the loss, c, in the first step"),
        Search(1e-4, 1e-1, log=True),
    ] = 1e-3
    cost_patience: int = Field(
        5, ge=1, description="steps in a row, within the budget or not, after which c changes"
    )
    places: Literal["all", "last_half"] = Field(
        "all", description="whether all activations have bounds, or those in the last half of the net"
    )
    targets: Literal["labels", "answers"] = Field(
        "labels", description="what the net shall keep: the labels, or the suspect's own answers"
    )
    batch_size: int = Field(
        128, ge=1, description="images a step; the source takes all, as `faithful` does"
    )
    shift: int = Field(0, ge=0, description="pixels that images are shifted by at most, anew each step")
    flip: bool = Field(False, description="whether half of the images are flipped, anew each step")
    faithful: bool = Field(
        False,
        description="whether the order of the published code is kept: bounds before the step whose "
        "accuracy is measured, the last bounds where none are within the budget, images augmented once",
    )

    def steps(self, images: int) -> int:
        """Those of Adam."""
        return self.iterations

    def warnings(self) -> list[str]:
        """Whether bounds can come down at all."""
        reach = self.bound_lr * self.iterations
        if self.parametrisation == "absolute" or reach >= self.deviations:
            return []
        return [
            f"bound_lr {self.bound_lr:g} and iterations {self.iterations} move a bound by at most "
            f"{reach:g} standard deviations, and it begins at {self.deviations:g}."
        ]


class Unit(SimpleDefence[UnitConfig]):
    """Activations cut off by learned bounds."""

    name = "unit"
    config = UnitConfig
    needs_labels = True
    numbers = ("clipped_share", "within_budget", "accuracy_before", "accuracy_after")

    def check(self, model: nn.Module, images: Tensor) -> None:
        net = admit(model, images).model
        places_of(net, images[:1].to(_dtype(net)), "all")

    def defend(
        self,
        model: nn.Module,
        clean: CleanData,
        config: UnitConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[UnitConfig]:
        """Learn the bounds; steps are what a run goes on from.

        Raises:
            ModelError: the model has no activation that can be cut off.
        """
        net = admit(model, clean.images).model.requires_grad_(False)
        clean = CleanData(clean.images.to(_dtype(net)), clean.labels)
        if config.targets == "answers":
            clean = CleanData(clean.images, _answers(net, clean.images))
        train, chosen_by = split(clean, HELD_OUT, generator)
        if config.faithful:
            images = augment(train.images, shift=config.shift, flip=config.flip, generator=generator)
            train = CleanData(images, train.labels)
        chosen_by = _some(chosen_by, MOST_CHECKED, generator)
        before = accuracy(net, chosen_by)
        # few held-out images miss what is lost: the images learned on must keep within the budget, too
        checked = [chosen_by] if config.faithful else [chosen_by, _some(train, MOST_CHECKED, generator)]
        least = [accuracy(net, part) - config.accuracy_drop - 1e-9 for part in checked]
        scaled = config.parametrisation == "scaled"
        bounded = bounded_net(
            net,
            train.images,
            deviations=config.deviations,
            granularity=config.granularity,
            scaled=scaled,
            which=config.places,
        )
        schedule = CostSchedule(config.cost, config.cost_patience)
        learned = Learned(bounded, schedule.state())
        adam = torch.optim.Adam(learned.numbers.parameters(), config.bound_lr, betas=(0.5, 0.9))

        def ending() -> tuple[dict[str, Tensor], dict[str, float]]:
            found = bool(learned.best_size.isfinite())
            last = config.faithful and not found
            bounds = bounded.bounds(learned.numbers) if last else learned.best
            bounded.set([bound.detach() for bound in bounds])
            numbers = {
                "clipped_share": clipped_share(bounded, chosen_by.images),
                "within_budget": float(found),
                "accuracy_before": before,
                "accuracy_after": accuracy(bounded.net, chosen_by),
            }
            named = zip(bounded.places, bounds, strict=True)
            return {f"{place.module}.bound": bound for place, bound in named}, numbers

        with Loop(
            self,
            model,
            config,
            {"learned": learned, "moments": adam},
            ending,
            generator=generator,
            device=clean.images.device,
            keeper=keeper,
        ) as loop:
            schedule.put(learned.schedule)
            for _ in loop.epochs(config.iterations):
                images, labels = _batch(train, config, generator)
                bounds = bounded.bounds(learned.numbers)
                bounded.set(bounds)
                cross_entropy = F.cross_entropy(bounded.net(images), labels)
                size = size_of(learned.numbers, bounds, scaled)
                adam.zero_grad()
                (cross_entropy + schedule.cost * size).backward()
                adam.step()
                losses = {
                    "cross_entropy": cross_entropy.item(),
                    "bounds": schedule.cost * size.item(),
                }
                with torch.no_grad():
                    hold_above_zero(bounded, learned.numbers)
                    after = bounded.bounds(learned.numbers)
                    bounded.set(after)
                    good = all(
                        accuracy(bounded.net, part) >= bound
                        for part, bound in zip(checked, least, strict=True)
                    )
                    measured = bounds if config.faithful else after
                    kept = size if config.faithful else size_of(learned.numbers, after, scaled)
                    if good and float(kept) < float(learned.best_size):
                        learned.keep(measured, float(kept))
                schedule.step(good)
                learned.schedule.copy_(schedule.state())
                loop.passes.add(forward=1 + len(checked), backward=1)
                if loop.step(losses, on_step):
                    return loop.result()
            if not bool(learned.best_size.isfinite()):
                warn(
                    f"No bounds kept the accuracy within {config.accuracy_drop:g} of the suspect's on "
                    f"{len(chosen_by.images)} clean images; the result has the "
                    f"{'last ones' if config.faithful else 'bounds of the beginning'}. Give a larger "
                    "`accuracy_drop` or more `deviations`."
                )
            return loop.result()

    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor], config: UnitConfig) -> nn.Module:
        """A copy of the model with an `ActivationBound` around each of these modules."""
        bounded = copied(unwrapped(model)[0])
        names = [name.removesuffix(".bound") for name in tensors]
        for name in sorted(names, key=lambda name: -name.count(".")):
            bound = tensors[f"{name}.bound"].to(like(bounded, name))
            put_around(bounded, name, ActivationBound(bounded.get_submodule(name), bound))
        return bounded.eval()


def _batch(train: CleanData, config: UnitConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    assert train.labels is not None
    if config.faithful:
        return train.images, train.labels
    rows = torch.randperm(len(train.images), generator=generator)[: config.batch_size]
    index = upload(rows, train.images)
    images = augment(train.images[index], shift=config.shift, flip=config.flip, generator=generator)
    return images, train.labels[index]


def _some(clean: CleanData, most: int, generator: torch.Generator) -> CleanData:
    if len(clean.images) <= most:
        return clean
    assert clean.labels is not None
    index = upload(torch.randperm(len(clean.images), generator=generator)[:most], clean.images)
    return CleanData(clean.images[index], clean.labels[index])


@torch.no_grad()
def _answers(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(part).argmax(1) for part in images.split(512)])


def _dtype(net: nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
