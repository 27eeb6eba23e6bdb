"""What a net answers: where the logits are in it, and those of many images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bimask.errors import ModelError

PASS = 256  # images in one pass
NAMED = ("logits", "out", "output", "outputs", "scores", "pred", "preds", "prediction", "predictions")


def taken(answer: Any, take: str | int | None) -> Tensor:
    """The logits in an answer."""
    if take is None:
        found = answer
    elif isinstance(take, int) or isinstance(answer, Mapping):
        found = answer[take]
    else:
        found = getattr(answer, take)
    assert isinstance(found, Tensor)
    return found


def where_logits(answer: Any, images: int) -> tuple[str | int | None, bool, list[str]]:
    """Where in an answer the logits are, whether they need flattening, and what to say of it.

    Raises:
        ModelError: they cannot be told apart, or there are none.
    """
    if isinstance(answer, Tensor):
        return None, _shaped(answer, images), []
    fields: dict[str | int, Any]
    if isinstance(answer, Mapping):
        fields = dict(answer)
    elif isinstance(answer, tuple) and hasattr(answer, "_fields"):
        fields = dict(zip(answer._fields, answer, strict=True))
    elif isinstance(answer, (tuple, list)):
        fields = dict(enumerate(answer))
    else:
        fields = {name: getattr(answer, name) for name in NAMED if hasattr(answer, name)}
    rows = {
        name: value
        for name, value in fields.items()
        if isinstance(value, Tensor)
        and value.ndim >= 2
        and value.is_floating_point()
        and value.shape[:1] == (images,)
        and value.flatten(1).shape[1] == value.shape[1:2].numel()
    }
    named = [name for name in NAMED if name in rows]
    if not named and len(rows) > 1 and len({tuple(v.shape) for v in rows.values()}) > 1:
        sizes = ", ".join(f"{name}: {tuple(value.shape)}" for name, value in rows.items())
        raise ModelError(
            f"The model answers with several rows of numbers an image ({sizes}) and nothing says which "
            "are the logits; return the logits alone, or name them `logits`."
        )
    if not rows:
        raise ModelError(
            f"The model answers with {type(answer).__name__} in which no tensor has one row of logits "
            "an image, (N, K); return the logits of a classifier."
        )
    take = named[0] if named else list(rows)[-1]
    flatten = _shaped(rows[take], images)
    kind = type(answer).__name__
    return take, flatten, [f"The model answers with {kind}; its entry {take!r} is taken as the logits."]


def _shaped(logits: Tensor, images: int) -> bool:
    """Whether logits (N, K, 1, 1) are to be flattened.

    Raises:
        ModelError: they are no rows of two or more logits.
    """
    wide = logits.ndim > 2 and logits.flatten(1).shape[1] == logits.shape[1]
    if (
        not logits.is_floating_point()
        or logits.shape[:1] != (images,)
        or (logits.ndim != 2 and not wide)
    ):
        raise ModelError(
            f"The model answers {images} images with {logits.dtype} {tuple(logits.shape)}; one row of "
            f"logits an image is needed, ({images}, K)."
        )
    if logits.shape[1] == 1:
        raise ModelError(
            "The model answers with one logit an image; give it two columns, as in "
            "`torch.cat([torch.zeros_like(z), z], 1)` of its answer z, one for each class."
        )
    return wide


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, K) of images (N, C, H, W), pass by pass."""
    return torch.cat([model(part) for part in images.split(PASS)])
