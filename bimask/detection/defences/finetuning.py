"""Fine-tuning of detectors on clean pictures and their boxes: what a defence must beat.

    ft        w <- SGD step along the gradient of the detector's own losses
    ft_sam    the same, but the gradient is taken where the loss of the batch is high (Zhu, Wei, Shen,
              Fan, Wu, ICCV 2023, arXiv 2304.11823; see `bimask.defences.finetuning.ft_sam`)

Nothing in the loss asks the detector to forget. "BadDet+" (arXiv 2601.21066) reports that with some
hundred clean pictures of traffic signs the success of disappearance and misclassification stays above
0.4 under both.

The published `rho` of 2 is of classifiers with millions of weights: it takes a small detector apart.

Use `ft` as the line that a defence must beat. It costs one pass forward and one back of every picture
an epoch, `ft_sam` twice that. Both need boxes and labels, and no other thing of the detector than its
losses and their gradients.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from bimask.defences.finetuning.ft_sam import sam_step
from bimask.defences.loop import Loop, cosine, set_lr
from bimask.defences.settings import Search
from bimask.defences.sgd import descend
from bimask.defences.simple import BEGINNING, Defended, Keeper, OnOwnStep
from bimask.detection.defences.base import (
    DetectorConfig,
    DetectorDefence,
    Pictures,
    admitted,
    epoch_of,
    learn_statistics,
    loss_of,
    pictures_of,
    sgd,
)


class DetectorFtConfig(DetectorConfig):
    """The settings of plain fine-tuning of a detector."""

    statistics: bool = Field(
        False, description="whether the running statistics of batch norms follow the pictures"
    )


class DetectorFtSamConfig(DetectorFtConfig):
    """The settings of FT-SAM of a detector."""

    rho: Annotated[
        float,
        Field(ge=0, description="size of the adaptive perturbation; 0 is plain fine-tuning"),
        Search(0.03, 2.0, log=True),
    ] = 0.3


class DetectorFt(DetectorDefence[DetectorFtConfig]):
    """Plain fine-tuning of a detector."""

    name = "ft"
    config = DetectorFtConfig

    def defend(
        self,
        model: nn.Module,
        clean: Any,
        config: DetectorFtConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[DetectorFtConfig]:
        """Fine-tune all weights on the detector's own losses. Epochs are what a run goes on from."""
        return _fine_tuned(self, model, pictures_of(clean), config, 0.0, generator, on_step, keeper)


class DetectorFtSam(DetectorDefence[DetectorFtSamConfig]):
    """Fine-tuning of a detector with sharpness-aware minimisation."""

    name = "ft_sam"
    config = DetectorFtSamConfig

    def defend(
        self,
        model: nn.Module,
        clean: Any,
        config: DetectorFtSamConfig,
        *,
        generator: torch.Generator,
        prepared: Any = None,
        on_step: OnOwnStep | None = None,
        keeper: Keeper = BEGINNING,
    ) -> Defended[DetectorFtSamConfig]:
        """The same, along the gradient at a perturbation of the weights."""
        found = _fine_tuned(
            self, model, pictures_of(clean), config, config.rho, generator, on_step, keeper
        )
        return found


def _fine_tuned(
    defence: DetectorDefence[Any],
    model: nn.Module,
    pictures: Pictures,
    config: Any,
    rho: float,
    generator: torch.Generator,
    on_step: OnOwnStep | None,
    keeper: Keeper,
) -> Defended[Any]:
    detector = admitted(model)
    if config.statistics:
        learn_statistics(detector)
    optimiser = sgd(detector, config)
    with Loop(
        defence,
        model,
        config,
        {"net": detector, "moments": optimiser},
        lambda: (detector.state_dict(), {}),
        generator=generator,
        device=pictures.images[0].device,
        keeper=keeper,
    ) as loop:
        for epoch in loop.epochs(config.epochs):
            set_lr(optimiser, config.lr * cosine(epoch, config.epochs))
            for batch in epoch_of(pictures, config.batch_size, generator, flip=config.flip):
                terms: dict[str, Tensor] = {}

                def loss(batch: Pictures = batch, terms: dict[str, Tensor] = terms) -> Tensor:
                    losses = detector.losses(batch.images, batch.labels)
                    terms.update({k: v for k, v in losses.items() if k not in terms})
                    return loss_of(losses)

                if rho > 0:
                    sam_step(detector, optimiser, loss, rho)
                    loop.passes.add(forward=2, backward=2)
                else:
                    descend(optimiser, loss())
                    loop.passes.add(forward=1, backward=1)
                if loop.step({name: term.item() for name, term in terms.items()}, on_step):
                    return loop.result()
        return loop.result()
