"""Defend one model with one configuration, whose type names the defence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn

from bimask.defences import DEFENCES
from bimask.defences.base import CleanData, Defence, DefenceResult, StepLog
from bimask.defences.ims import purify as ims
from bimask.defences.ims.config import PurifyConfig
from bimask.defences.ims.result import PurifyResult, RoundLog
from bimask.defences.settings import DefenceConfig
from bimask.errors import NonFiniteError, SettingError
from bimask.inspection.trigger_pool import TriggerPool
from bimask.masking.masks import MaskSet


def defence_of(config: DefenceConfig) -> Defence[Any]:
    """The defence whose settings these are.

    Raises:
        SettingError: of none in `DEFENCES`.
    """
    for defence in DEFENCES.values():
        if type(config) is defence.config:
            return defence
    known = ", ".join(defence.config.__name__ for defence in DEFENCES.values())
    raise SettingError(f"A {type(config).__name__} is of no known defence; settings are {known}.")


def defend(
    model: nn.Module,
    images: Tensor,
    config: DefenceConfig,
    *,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
    prepared: Any = None,
    on_step: Callable[[StepLog, Callable[[], DefenceResult]], bool | None] | None = None,
) -> DefenceResult:
    """Take the backdoor out of `model` with any defence.

    Args:
        model: the suspect, (N, C, H, W) in [0, 1] -> (N, K) logits; left as it is.
        images: clean images (N, C, H, W), float in [0, 1].
        config: settings of a defence in `DEFENCES`.
        labels: (N,) int64; handed on only to a defence that declares a need of them.
        generator: CPU; None is one of seed 0.
        prepared: what `Defence.preparation` made.
        on_step: called after every step with its log and what the run would end with now; a true answer
            ends it there.

    Raises:
        SettingError: labels are needed and not there, or images or settings do not fit.
        NonFiniteError: a loss is NaN or infinite.
    """
    defence = defence_of(config)
    if defence.needs_labels and labels is None:
        raise SettingError(
            f"The defence {defence.name} learns from the labels of its clean images, but got none; "
            "give `labels`, or pictures in class folders."
        )
    if labels is not None and defence.needs_labels:
        labels = _checked(labels, images)
    (result,) = defence.run(
        model,
        CleanData(images, labels if defence.needs_labels else None),
        [config],
        generators=[generator or torch.Generator().manual_seed(0)],
        prepared=prepared,
        on_step=None if on_step is None else lambda _member, log, current: on_step(log, current),
    )
    if isinstance(result, NonFiniteError):
        raise result
    return result


def _checked(labels: Tensor, images: Tensor) -> Tensor:
    """The labels as int64 where the images are.

    Raises:
        SettingError: not one whole number >= 0 an image.
    """
    whole = not labels.is_floating_point() and labels.shape == images.shape[:1]
    if not whole or bool((labels < 0).any()):
        raise SettingError(
            f"Labels must be one whole number >= 0 for each of {len(images)} images, got "
            f"{tuple(labels.shape)} of {labels.dtype}."
        )
    return labels.to(images.device, torch.int64)


@overload
def purify(
    model: nn.Module,
    images: Tensor,
    config: PurifyConfig | None = None,
    *,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
    pool: TriggerPool | None = None,
    on_round: Callable[[RoundLog, MaskSet], bool | None] | None = None,
) -> PurifyResult: ...


@overload
def purify(
    model: nn.Module,
    images: Tensor,
    config: DefenceConfig,
    *,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> DefenceResult: ...


def purify(
    model: nn.Module,
    images: Tensor,
    config: DefenceConfig | None = None,
    *,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
    pool: TriggerPool | None = None,
    on_round: Callable[[RoundLog, MaskSet], bool | None] | None = None,
) -> DefenceResult:
    """Take the backdoor out of `model`: IMS, or the defence whose settings `config` is.

    Args:
        model: the suspect, (N, C, H, W) in [0, 1] -> (N, K) logits; left as it is.
        images: clean images (N, C, H, W), float in [0, 1].
        config: settings; None means the published ones of IMS.
        labels: (N,) int64, for defences that learn from them; IMS is handed none.
        generator: CPU; draws batches and whatever else is random.
        pool: of IMS: triggers that were searched before.
        on_round: of IMS: called after every round with its log and the masks as they are then; a true
            answer ends the run there.

    Raises:
        SettingError: images, labels or settings do not fit.
        MaskMismatchError: the model has nothing to mask.
        NonFiniteError: a loss is NaN or infinite.
    """
    if config is None or isinstance(config, PurifyConfig):
        return ims.purify(model, images, config, generator=generator, pool=pool, on_round=on_round)
    if pool is not None or on_round is not None:
        raise SettingError(
            "`pool` and `on_round` are of IMS; `bimask.defences.purify.defend` has more."
        )
    return defend(model, images, config, labels=labels, generator=generator)
