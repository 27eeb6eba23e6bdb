"""One purification: the masks that remove a backdoor from a model. See
`bimask.defences.ims.population`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bimask.defences.base import Passes
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.population import PopulationPurifier
from bimask.defences.ims.result import PurifyResult, RoundLog, Stage
from bimask.errors import NonFiniteError
from bimask.inspection.trigger_pool import TriggerPool
from bimask.masking.masks import MaskSet

__all__ = ["Passes", "PurifyResult", "RoundLog", "Stage", "purify"]


def purify(
    model: nn.Module,
    images: Tensor,
    config: PurifyConfig | None = None,
    *,
    generator: torch.Generator | None = None,
    pool: TriggerPool | None = None,
    on_round: Callable[[RoundLog, MaskSet], bool | None] | None = None,
) -> PurifyResult:
    """Learn the masks that remove a backdoor from `model`: a population of one.

    Args:
        model: the suspect, (N, C, H, W) in [0, 1] -> (N, K) logits, with a Conv2d or an encoder block.
            It is copied, never edited; batch norm is frozen.
        images: clean images (N, C, H, W), float in [0, 1]. No labels.
        config: settings; None means the published ones.
        generator: CPU; draws the batches, and the images whose perturbations go on.
        pool: see `PopulationPurifier`.
        on_round: called after every round with its log and the masks as they are then; a true answer
            ends the run there.

    Raises:
        SettingError: images of another shape or outside [0, 1].
        MaskMismatchError: the model has nothing to mask.
        NonFiniteError: a loss is NaN or infinite, with its stage and round.
    """

    of_member = None if on_round is None else lambda _member, log, masks: on_round(log, masks)
    population = PopulationPurifier(
        model, images, [config or PurifyConfig()], generators=[generator], pool=pool, on_round=of_member
    )
    (result,) = population.run()
    if isinstance(result, NonFiniteError):
        raise result
    return result
