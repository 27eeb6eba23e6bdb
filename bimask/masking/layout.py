"""The memory layout that convolutions are fastest in, for the models that can bear it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bimask.masking.copies import copied


@torch.no_grad()
def bears_channels_last(model: nn.Module, images: Tensor) -> bool:
    """Whether the model, with its weights in channels_last, takes images of that layout: not if it
    calls `view` on what it computes, nor if it has no convolution to gain.

    Args:
        model: images -> logits, in eval mode; left as it is.
        images: (N, C, H, W), a few.
    """
    if not any(parameter.ndim == 4 for parameter in model.parameters()):
        return False
    tried = copied(model).to(memory_format=torch.channels_last)
    try:
        tried(images.clone(memory_format=torch.channels_last))
    except RuntimeError:  # view: size is not compatible with stride
        return False
    return True
