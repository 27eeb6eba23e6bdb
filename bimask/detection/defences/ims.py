"""Invertible pruning masks on the backbone of a detector.

After Dunnett, Arablouei, Miller, Dedeoglu, Jurdak, "Backdoor Mitigation via Invertible Pruning Masks",
NeurIPS 2025 (arXiv 2509.15497), which is of classifiers; **its form for detectors is ours.**
f is the suspect, f_a the masked and f_abar the inverse-masked detector; every convolution of the
backbone bears masks (`bimask.masking`). What such a detector answers about an object is the mean of the
log-odds of the predictions that are matched to it, and 0 for "none of them", so that the agreement
losses (`bimask.metrics.agreement`) compare distributions over the classes and none: what is erased
differs from what is seen, as what is relabelled does.

    initialise   agree(f_a(x), f(x)) + disagree(f_abar(x), f(x)) + L_det(f_a, x) + selection cost
    minimise     agree(f_a(x), f(x)) + agree(f_a(x+d), f(x)) + agree(f_abar(x+d), f(x+d))
                 + disagree(f_abar(x+d), f(x)) + disagree(f_abar(x), f(x)) + L_det(f_a, x)
    select       the same + selection cost
    d            min   agree(f_abar(x+d), f(x+d)) + disagree(f(x+d), f(x))       in the ball, by PGD

L_det is the detector's own losses, without which nothing would hold its boxes.

The masks are folded into the weights, so that the detector keeps its architecture. Use it where the
weights themselves may not be learned anew. It costs 2 `inner_steps` + 5 passes of a batch a round. It
needs boxes and labels, a family whose assigner is known, and convolutions in the backbone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from bimask.defences.ims.losses import selection_cost
from bimask.defences.loop import Loop, steps_an_epoch
from bimask.defences.settings import DefenceConfig, Search
from bimask.defences.simple import BEGINNING, Defended, Keeper, OnOwnStep
from bimask.detection.defences.base import (
    BatchSize,
    DetectorDefence,
    Pictures,
    admitted,
    epoch_of,
    loss_of,
    pictures_of,
)
from bimask.detection.defences.perturbed import Ball, Region, perturbed
from bimask.detection.defences.repair import REGION, Radius
from bimask.detection.nets.detector import Detector
from bimask.detection.nets.matched import Matched, matched
from bimask.detection.objects import Target
from bimask.errors import MaskMismatchError, ModelError
from bimask.masking.masks import MaskSet, fold, masked
from bimask.masking.sites import sites_of
from bimask.metrics.agreement import agree, disagree
from bimask.nets.admission import unwrapped

Rounds = Annotated[int, Field(ge=0, description="batches of this stage")]
SHARPNESS = 20.0  # as published


class DetectorImsConfig(DefenceConfig):
    """The settings of masks on a detector; where the paper has them, its own but for the rounds."""

    mask_lr: Annotated[
        float,
        Field(gt=0, description="AdamW's rate on masks and selections"),
        Search(0.01, 0.3, log=True),
    ] = 0.02
    selection_weight: Annotated[
        float, Field(ge=0, description="of initialise and select"), Search(0.3, 30, log=True)
    ] = 10.0
    detection_weight: Annotated[
        float,
        Field(ge=0, description="of the masked detector's own losses on clean pictures"),
        Search(0.1, 10, log=True),
    ] = 1.0
    initialise_rounds: Rounds = 30
    minimise_rounds: Rounds = 60
    select_rounds: Rounds = 60
    batch_size: BatchSize = 16
    radius: Radius = 0.3
    inner_steps: Annotated[int, Field(ge=1, description="of PGD, each round"), Search(1, 8)] = 5
    region: Region = Field("picture", description=REGION)

    def steps(self, images: int) -> int:
        """Rounds of all stages."""
        return self.initialise_rounds + self.minimise_rounds + self.select_rounds


class DetectorIms(DetectorDefence[DetectorImsConfig]):
    """Invertible pruning masks on the backbone of a detector."""

    name = "ims"
    config = DetectorImsConfig
    needs_family = True
    numbers = ("pruned_share",)
    stem = "masks"

    def check(self, model: nn.Module, images: Any) -> None:
        super().check(model, images)
        masks_of(admitted(model))

    def defend(
        self,
        model: nn.Module,
        clean: Any,
        config: DetectorImsConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[DetectorImsConfig]:
        """Learn masks. Epochs are what a run goes on from.

        Raises:
            ModelError: the backbone has no convolution.
        """
        pictures = pictures_of(clean)
        pictures = pictures.at([i for i, one in enumerate(pictures.labels) if len(one["labels"])])
        detector = admitted(model).requires_grad_(False)
        masks = masks_of(detector)
        optimiser = torch.optim.AdamW(masks.parameters(), config.mask_lr, weight_decay=0.01)

        def ending() -> tuple[dict[str, Tensor], dict[str, float]]:
            pruned = (masks.keep() < 0.5).double().mean()
            return masks.tensors(), {"pruned_share": float(pruned)}

        with Loop(
            self,
            model,
            config,
            {"masks": masks, "moments": optimiser},
            ending,
            generator=generator,
            device=pictures.images[0].device,
            keeper=keeper,
        ) as loop:
            for number, batch in _rounds(loop, config, pictures, generator):
                triggered = number >= config.initialise_rounds
                terms = self._terms(detector, masks, batch, config, triggered, generator)
                if (
                    number < config.initialise_rounds
                    or number >= config.steps(0) - config.select_rounds
                ):
                    cost = config.selection_weight * selection_cost(masks.selections())
                    terms["selection_cost"] = cost
                optimiser.zero_grad()
                loss_of(terms).backward()
                optimiser.step()
                masks.clamp_()
                inner = config.inner_steps if triggered else 0
                loop.passes.add(forward=2 * inner + (7 if triggered else 3), backward=inner + 5)
                if loop.step({name: term.item() for name, term in terms.items()}, on_step):
                    break
            return loop.result()

    def restore(
        self, model: nn.Module, tensors: Mapping[str, Tensor], config: DetectorImsConfig
    ) -> nn.Module:
        """The detector whose weights carry the masks."""
        plain, _ = unwrapped(model)
        return fold(plain, self.masks(tensors, config)).eval()

    def masks(self, tensors: Mapping[str, Tensor], config: DetectorImsConfig) -> MaskSet:
        """The masks as they were learned."""
        return MaskSet.from_tensors(dict(tensors), sharpness=SHARPNESS)

    def _terms(
        self,
        detector: Detector,
        masks: MaskSet,
        batch: Pictures,
        config: DetectorImsConfig,
        triggered: bool,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        def answers(images: Sequence[Tensor]) -> Tensor:
            return object_answers(matched(detector, images, batch.labels), batch.labels)

        x = batch.images
        with torch.no_grad():
            clean = answers(x)
        with masked(detector, masks):
            kept = matched(detector, x, batch.labels)
        with masked(detector, masks, inverse=True):
            inverse = answers(x)
        terms = {
            "clean_agree": agree(object_answers(kept, batch.labels), clean),
            "inverse_clean_disagree": disagree(inverse, clean),
            "detection": config.detection_weight * loss_of(kept.losses),
        }
        if not triggered:
            return terms

        def objective(images: Sequence[Tensor]) -> Tensor:
            own = answers(images)
            with masked(detector, masks, inverse=True):
                other = answers(images)
            return agree(other, own) + disagree(own, clean)

        ball = Ball(config.radius, config.inner_steps, config.region)
        moved = perturbed(batch, objective, ball, generator)
        with torch.no_grad():
            wrong = answers(moved)
        with masked(detector, masks):
            kept_moved = answers(moved)
        with masked(detector, masks, inverse=True):
            inverse_moved = answers(moved)
        return terms | {
            "triggered_agree": agree(kept_moved, clean),
            "inverse_triggered_agree": agree(inverse_moved, wrong),
            "inverse_triggered_disagree": disagree(inverse_moved, clean),
        }


def masks_of(detector: Detector) -> MaskSet:
    """New masks of every convolution of the backbone.

    Raises:
        ModelError: it has none.
    """
    prefix = "net.backbone"
    backbone = dict(detector.named_modules()).get(prefix)
    sites = {} if backbone is None else sites_of(backbone)
    try:
        return MaskSet({f"{prefix}.{name}": size for name, size in sites.items()}).like(detector)
    except MaskMismatchError as error:
        raise ModelError(
            f"A {type(detector.net).__name__} without a convolution in a `backbone` has nothing to "
            "mask; take another defence, such as `soft_branch`."
        ) from error


def object_answers(seen: Matched, targets: Sequence[Target]) -> Tensor:
    """What is said about every object of the targets: (J, K + 1) logits, the mean log-odds of the
    predictions that are matched to it, and 0 for none of the classes; zeros where none is matched."""
    counts = torch.tensor([0, *(len(target["labels"]) for target in targets)]).cumsum(0)
    place = counts.to(seen.picture)[seen.picture] + seen.object
    total = seen.logits.new_zeros(int(counts[-1]), seen.logits.shape[1] + 1)
    rows = torch.cat([seen.logits, torch.zeros_like(seen.logits[:, :1])], 1)
    matches = torch.bincount(place, minlength=len(total)).clamp_min(1)
    return total.index_add(0, place, rows) / matches[:, None]


def _rounds(
    loop: Loop[Any], config: DetectorImsConfig, pictures: Pictures, generator: torch.Generator
) -> Iterator[tuple[int, Pictures]]:
    """The batches of all stages, epoch after epoch of the loop, with their numbers from 0."""
    an_epoch, count = steps_an_epoch(len(pictures), config.batch_size), config.steps(0)
    for epoch in loop.epochs(-(-count // an_epoch)):
        numbers = range(epoch * an_epoch, min(count, (epoch + 1) * an_epoch))
        yield from zip(numbers, epoch_of(pictures, config.batch_size, generator), strict=False)
