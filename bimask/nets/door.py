"""What stands in front of a stranger's model, so that it answers as a plain classifier does.

A door is two hooks on the model's root: its modules and tensors keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import NoneType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bimask.nets.answers import taken

Undo = Literal["nothing", "log"]


@dataclass(frozen=True)
class Door:
    """How a model is asked, and where its logits are in what it answers.

    Attributes:
        take: name or position of the logits in the answer; None where the answer is a tensor.
        undo: "log" where the rows are probabilities: their logarithms are logits.
        flatten: whether logits come as (N, K, 1, 1).
        clone: whether the model changes the images that it is given.
        contiguous: whether it needs images in the plain memory layout.
        bypass: modules that are left out, a softmax or sigmoid at the end.
    """

    take: str | int | None = None
    undo: Undo = "nothing"
    flatten: bool = False
    clone: bool = False
    contiguous: bool = False
    bypass: tuple[str, ...] = ()

    def install(self, model: nn.Module) -> None:
        """Stand at the root of `model`; hooks of its own stay before."""
        for name in self.bypass:
            left_out = model.get_submodule(name)
            for place, module in list(model.named_modules(remove_duplicate=False)):
                if module is left_out:  # it may have several names
                    model.set_submodule(place, nn.Identity())
        if self.clone or self.contiguous:
            model.register_forward_pre_hook(self._enter)
        if self.take is not None or self.undo != "nothing" or self.flatten:
            model.register_forward_hook(self._leave)

    def _enter(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        images: Tensor = inputs[0]
        if self.contiguous:  # `contiguous()` leaves the strides of images of one channel as they are
            images = images.clone(memory_format=torch.contiguous_format)
        elif self.clone:
            images = images.clone()
        return (images, *inputs[1:])

    def _leave(self, _module: nn.Module, _inputs: Any, answer: Any) -> Tensor:
        logits = taken(answer, self.take)
        logits = logits.flatten(1) if self.flatten else logits
        return logits.clamp_min(torch.finfo(logits.dtype).tiny).log() if self.undo == "log" else logits

    def as_json(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self) | {"bypass": list(self.bypass)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Door:
        """The door that `as_json` wrote.

        Raises:
            TypeError: something else.
        """
        take = content.get("take")
        if not isinstance(take, (str, int, NoneType)) or content.get("undo", "nothing") not in (
            "nothing",
            "log",
        ):
            raise TypeError(f"a door takes {take!r} and undoes {content.get('undo')!r}")
        return cls(**{**content, "bypass": tuple(content.get("bypass", ()))})
