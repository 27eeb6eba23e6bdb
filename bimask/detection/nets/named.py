"""Detectors by name:

    small_fcos                   our own, see `bimask.detection.nets.small_fcos`
    torchvision:NAME             a detection model of torchvision, without weights
    package.module:factory       the user's own, importable
    path/to/file.py:factory      the user's own, in a file anywhere

Nothing is downloaded. Own factories run where a net is built, under the rule of trust of
`bimask.nets.named`. They are called by keyword with `num_classes`, the number of the data's classes,
and, where their signature has them, `width` and `image_size`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from bimask.detection.nets.detector import Detector, label_ids_of
from bimask.detection.nets.small_fcos import small_fcos
from bimask.errors import SettingError
from bimask.nets.named import TORCHVISION, call_with, factory_of, is_own, require_known

DETECTORS: dict[str, Callable[..., nn.Module]] = {"small_fcos": small_fcos}
NO_BACKGROUND = ("fcos", "retinanet")  # torchvision's families without an output for it
WITH_MORE = ("maskrcnn", "keypointrcnn")  # learn masks or keypoints beside boxes
FIXED_SIZE = ("ssd",)  # bring pictures to a size of their own


def check_detector(name: str) -> None:
    """Refuse a name that no detector can have; nothing is imported and nothing run.

    Raises:
        SettingError: none of the forms above, or a file that is not there.
    """
    library, _, model = name.partition(":")
    if name in DETECTORS:
        return
    if library == TORCHVISION:
        if model not in _torchvision_names():
            raise SettingError(
                f"torchvision has no detector {model!r} that learns from boxes alone; it has "
                f"{', '.join(_torchvision_names())}."
            )
    elif is_own(name):
        require_known(name, DETECTORS)
    else:
        raise SettingError(
            f"Unknown detector {name!r}; known are {', '.join(sorted(DETECTORS))}, torchvision:NAME, "
            "package.module:factory and path/to/file.py:factory."
        )


def build_detector(
    name: str,
    *,
    num_classes: int,
    width: int | None = None,
    image_size: int | None = None,
    label_ids: Sequence[int] | None = None,
    outputs: int | None = None,
) -> Detector:
    """The detector `name` with new weights.

    Args:
        num_classes: of the data.
        width: channels, of `DETECTORS` and of factories that take a `width`; None is as published.
        image_size: what both sides of a picture are brought to at most, in pixels; None leaves it to
            the net. torchvision's SSD has a size of its own.
        label_ids: what the net calls each class; None leaves it to torchvision's conventions.
        outputs: what a net is told of its number of classes in place of `num_classes`, for weights
            that were trained on more; goes with `label_ids`.

    Raises:
        SettingError: the name is unknown, or its factory is missing, not trusted or fails.
        ModelError: it is no detector, or what it calls the classes is not known.
    """
    check_detector(name)
    library, _, model = name.partition(":")
    if label_ids is not None and len(label_ids) != num_classes:
        raise SettingError(
            f"`label_ids` must be one label for each of {num_classes} classes, got {len(label_ids)}."
        )
    if outputs is not None and label_ids is None:
        raise SettingError(
            f"Nothing says which of a net's {outputs} outputs the classes have; give `label_ids`."
        )
    offered: dict[str, Any] = {"num_classes": num_classes if outputs is None else outputs}
    if image_size is not None:
        offered["image_size"] = image_size
    if width is not None:
        offered["width"] = width
    if name in DETECTORS:
        factory = DETECTORS[name]
    elif library == TORCHVISION:
        factory = partial(_from_torchvision, model, background=outputs is None)
    else:
        factory = factory_of(name)
    net = call_with(name, factory, offered)
    if not isinstance(net, nn.Module):
        raise SettingError(
            f"The detector {name!r} must be a torch.nn.Module, but its factory gave "
            f"{type(net).__name__}."
        )
    return Detector(net, label_ids_of(net, num_classes) if label_ids is None else label_ids)


@torch.no_grad()
def require_answers(detector: Detector, height: int, width: int) -> None:
    """Ask a detector once for a black picture of such a size; `Detector.forward` says what is wrong."""
    modes = [(module, module.training) for module in detector.modules()]
    parameter = next(detector.parameters(), None)
    device = "cpu" if parameter is None else parameter.device
    try:
        detector.eval()([torch.zeros(3, height, width, device=device)])
    finally:
        for module, mode in modes:
            module.training = mode


def _torchvision_names() -> list[str]:
    from torchvision import models

    names = models.list_models(module=models.detection)
    return [name for name in names if not name.startswith(WITH_MORE)]


def _from_torchvision(
    name: str, num_classes: int, image_size: int | None = None, *, background: bool
) -> nn.Module:
    from torchvision import models

    settings: dict[str, Any] = {"weights": None, "weights_backbone": None}
    settings["num_classes"] = num_classes + (background and not name.startswith(NO_BACKGROUND))
    if image_size is not None and not name.startswith(FIXED_SIZE):
        settings |= {"min_size": image_size, "max_size": image_size}
    net: nn.Module = models.get_model(name, **settings)
    return net
