"""Clean accuracy, attack success rate, recovery accuracy, and what is derived from two of each.

All values are fractions. Of a model whose trigger nobody knows there is the clean accuracy alone
(`CleanSet`, `CleanScores`). Attack success and recovery count the same images: under all-to-one those
whose true class is not the target. They do not add up to 1; the rest is `misdirected`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor, nn

from bimask.attacks import Attack, TriggeredData
from bimask.data import ImageData
from bimask.devices import fast_bfloat16
from bimask.errors import DataError, NonFiniteError
from bimask.masking.copies import copied
from bimask.masking.layout import bears_channels_last

Split = Literal["val", "test"]
Precision = Literal["float32", "bfloat16"]

CHECKED = 64  # images on which bfloat16 is held against float32


@dataclass(frozen=True)
class EvalSets:
    """Clean images and their triggered counterparts of one split, made once, evaluated often."""

    clean: ImageData
    triggered: TriggeredData
    split: Split

    @classmethod
    def of(cls, attack: Attack, data: ImageData, split: Split) -> EvalSets:
        """Apply the attack's trigger to the images of `data` that count."""
        return cls(data, attack.triggered(data), split)

    def at_most(self, count: int) -> EvalSets:
        """The same with at most `count` images of each kind, evenly spaced among them."""
        return EvalSets(
            self.clean.subset(_spaced(len(self.clean), count)),
            self.triggered.subset(_spaced(len(self.triggered.images), count)),
            self.split,
        )

    def to(self, device: torch.device | str) -> EvalSets:
        """The same on another device."""
        return EvalSets(self.clean.to(device), self.triggered.to(device), self.split)


@dataclass(frozen=True)
class CleanSet:
    """Clean images of one split, for a model whose trigger nobody knows."""

    clean: ImageData
    split: Split

    def at_most(self, count: int) -> CleanSet:
        """As `EvalSets.at_most`."""
        return CleanSet(self.clean.subset(_spaced(len(self.clean), count)), self.split)

    def to(self, device: torch.device | str) -> CleanSet:
        """The same on another device."""
        return CleanSet(self.clean.to(device), self.split)


def _spaced(length: int, count: int) -> Tensor:
    """`count` indices among `length`, from the first to the last; all where they are fewer."""
    if length <= count:
        return torch.arange(length)
    return torch.linspace(0, length - 1, count).round().long()


@dataclass(frozen=True)
class CleanScores:
    """What is known of a model without its trigger: no attack success, no recovery."""

    clean_accuracy: float
    n_clean: int
    split: Split

    def arr(self, before: CleanScores) -> float:
        """As `Scores.arr`."""
        return _one_minus_ratio(self.clean_accuracy, before.clean_accuracy)


@dataclass(frozen=True)
class Scores:
    """Scores of one model on one split.

    Attributes:
        clean_accuracy: ACC, right answers on all clean images.
        attack_success: ASR, attack labels on triggered images (target class excluded).
        recovery: RA, true labels on the same triggered images.
        n_clean, n_triggered: images behind them.
        split: "val" to choose on, "test" to report.
    """

    clean_accuracy: float
    attack_success: float
    recovery: float
    n_clean: int
    n_triggered: int
    split: Split

    @property
    def misdirected(self) -> float:
        """Share of triggered images with neither the attack's nor the true label."""
        return 1 - self.attack_success - self.recovery

    def arr(self, before: Scores) -> float:
        """Accuracy reduction ratio 1 - ACC1/ACC0 (IMS, eq. 8); NaN where ACC0 = 0."""
        return _one_minus_ratio(self.clean_accuracy, before.clean_accuracy)

    def rdr(self, before: Scores) -> float:
        """Recovery difference ratio 1 - RA1/ACC0 (IMS, eq. 9); NaN where ACC0 = 0, may be < 0."""
        return _one_minus_ratio(self.recovery, before.clean_accuracy)

    def der(self, before: Scores) -> float:
        """Defence effectiveness rate in [0, 1]: (max(0, ASR drop) - max(0, ACC drop) + 1) / 2."""
        gain = max(0.0, before.attack_success - self.attack_success)
        return (gain - self._accuracy_lost(before) + 1) / 2

    def rir(self, before: Scores) -> float:
        """Robust improvement rate in [0, 1]: (max(0, RA gain) - max(0, ACC drop) + 1) / 2."""
        gain = max(0.0, self.recovery - before.recovery)
        return (gain - self._accuracy_lost(before) + 1) / 2

    def _accuracy_lost(self, before: Scores) -> float:
        return max(0.0, before.clean_accuracy - self.clean_accuracy)


def _one_minus_ratio(after: float, before: float) -> float:
    return 1 - after / before if before > 0 else float("nan")


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Tensor,
    *,
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> Tensor:
    """Classes of uint8 images: (N, C, H, W) -> (N,) int64, in eval mode; the mode is restored.

    Args:
        batch_size: images a pass; None means 512 on a CPU, elsewhere as many as memory allows.
        precision: with "bfloat16" the passes run in it where the device has it, and every image that
            could be answered otherwise in float32 is asked again there. Logits are taken to differ by
            no more than twice what they differ by on a sample, and classes closer than that are not
            told apart.

    Raises:
        NonFiniteError: logits that are NaN or infinite, which have no class.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        bears = bears_channels_last(model, images[:2].float() / 255)
        layout = torch.channels_last if bears else torch.contiguous_format
        if precision == "float32" or not fast_bfloat16(images.device):
            return _logits(model, images, batch_size, layout).argmax(1)
        low = copied(model).to(torch.bfloat16, memory_format=layout)  # type: ignore[call-overload]
        logits = _logits(low, images, batch_size, layout, torch.bfloat16)
        sample = torch.linspace(0, len(images) - 1, min(len(images), CHECKED)).long()
        sample = sample.to(images.device)
        bound = 2 * (_logits(model, images[sample], batch_size, layout) - logits[sample]).abs().max()
        first, second = logits.topk(min(2, logits.shape[1]), dim=1).values.T[[0, -1]]
        unsure = (first - second <= 2 * bound).nonzero().squeeze(1)
        answers = logits.argmax(1)
        if len(unsure):
            answers[unsure] = _logits(model, images[unsure], batch_size, layout).argmax(1)
        return answers
    finally:
        for module, training in modes.items():
            module.training = training


def _logits(
    model: nn.Module,
    images: Tensor,
    batch_size: int | None,
    layout: torch.memory_format,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Logits of uint8 images: (N, C, H, W) -> (N, K) float32, in the largest batches that fit."""
    size = batch_size or (512 if images.device.type == "cpu" else max(1, len(images)))
    while True:
        try:
            parts = [model(_floats(part, dtype, layout)).float() for part in images.split(size)]
            break
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-size // 2)
    logits = torch.cat(parts)
    if not logits.isfinite().all():
        raise NonFiniteError("The model answers with logits that are NaN or infinite.")
    return logits


def _floats(images: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """uint8 -> [0, 1], in a memory format."""
    return (images.float() / 255).to(dtype).clone(memory_format=layout)


@overload
def evaluate(
    model: nn.Module, sets: EvalSets, *, batch_size: int | None = ..., precision: Precision = ...
) -> Scores: ...
@overload
def evaluate(
    model: nn.Module, sets: CleanSet, *, batch_size: int | None = ..., precision: Precision = ...
) -> CleanScores: ...
def evaluate(
    model: nn.Module,
    sets: EvalSets | CleanSet,
    *,
    batch_size: int | None = None,
    precision: Precision = "float32",
) -> Scores | CleanScores:
    """Score `model` on one split; images and model on one device. Arguments as of `predict`.

    Raises:
        DataError: an empty set, whose scores would be undefined.
        NonFiniteError: logits that are NaN or infinite.
    """
    if isinstance(sets, CleanSet):
        if not len(sets.clean):
            raise DataError(f"Scores need clean images, got none in split {sets.split!r}.")
        answers = predict(model, sets.clean.images, batch_size=batch_size, precision=precision)
        right = _share(answers, sets.clean.labels)
        return CleanScores(right, len(sets.clean), sets.split)
    triggered = sets.triggered
    if not len(sets.clean) or not len(triggered.images):
        raise DataError(
            f"Scores need clean and triggered images, got {len(sets.clean)} and "
            f"{len(triggered.images)} in split {sets.split!r}."
        )
    answers = predict(model, sets.clean.images, batch_size=batch_size, precision=precision)
    under_attack = predict(model, triggered.images, batch_size=batch_size, precision=precision)
    return Scores(
        clean_accuracy=_share(answers, sets.clean.labels),
        attack_success=_share(under_attack, triggered.attack_labels),
        recovery=_share(under_attack, triggered.true_labels),
        n_clean=len(sets.clean),
        n_triggered=len(triggered.images),
        split=sets.split,
    )


def _share(got: Tensor, wanted: Tensor) -> float:
    return (got == wanted).sum().item() / len(wanted)
