"""Which net a victim has, and what its images are normalised by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from bimask.data import ImageData
from bimask.data.pictures import Size, height_and_width
from bimask.errors import BimaskError, SettingError, VictimError
from bimask.nets import Normalised, build_net, check_net, is_own, source_of
from bimask.nets.admission import admit
from bimask.nets.weights import file_sha256

# Left out of a spec's dump where unset, so that what was made before there were such keeps its digest.
UNLESS_SET = (
    *("weights", "weights_sha256", "net_sha256", "normalise", "optimizer", "warmup", "sam_rho"),
    *("imported", "imported_sha256", "dataset_sha256"),
)


def stamped(given: Any, check: Callable[[str], None]) -> Any:
    """The keys of a net's spec with the digests of its files, where they are not given.

    Args:
        check: refuses the name of a net that cannot be.

    Raises:
        ValueError: there is no such file.
    """
    if not isinstance(given, dict):
        return given
    net, weights, given = given.get("net"), given.get("weights"), dict(given)
    try:
        if isinstance(net, str) and is_own(net) and given.get("net_sha256") is None:
            check(net)
            given["net_sha256"] = file_sha256(source_of(net))
        if isinstance(weights, str) and given.get("weights_sha256") is None:
            given["weights_sha256"] = file_sha256(weights)
    except BimaskError as error:
        raise ValueError(str(error)) from error
    return given


class Statistics(BaseModel):
    """What a net's images are normalised by: one value a channel, in [0, 1] units."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    mean: list[float] = Field(min_length=1)
    std: list[float] = Field(min_length=1)


def _usual_width(given: dict[str, Any]) -> int | None:
    return 16 if given.get("net") in ("small_resnet", "preactresnet18") else None


class NetSpec(BaseModel):
    """A net by name, with weights of its own or without.

    The name is one of `NETS`, `torchvision:NAME`, `timm:NAME`, or the user's own factory,
    `package.module:factory` or `path/to/file.py:factory`; see `bimask.nets.named`. Paths are as seen
    from the working directory.

    Own nets and given weights take images in [0, 1] as they are, all others normalised ones, unless
    `normalise` says otherwise. The order of the classes is that of the dataset: for folders, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    net: str = "small_resnet"
    width: int | None = Field(
        default_factory=_usual_width,
        ge=1,
        description="channels of the first stage; null is the net as published. Unless given, 16 for "
        "small_resnet and preactresnet18, null for others",
    )
    weights: str | None = Field(None, description="a file of weights, whatever its name: no training")
    normalise: Literal["dataset", "none"] | Statistics | None = Field(
        None, description="by the training split's own values, not at all, or by {mean, std}"
    )
    weights_sha256: str | None = Field(None, description="of the file; filled in unless given")
    net_sha256: str | None = Field(None, description="of an own net's file; filled in unless given")

    @model_validator(mode="before")
    @classmethod
    def _stamped(cls, given: Any) -> Any:
        """Files go into the digest by their content, so that it can be had without them later."""
        return stamped(given, check_net)

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        return {key: v for key, v in values.items() if v is not None or key not in UNLESS_SET}

    @model_validator(mode="after")
    def _known_net(self) -> NetSpec:
        check_net(self.net)
        return self

    def fresh_net(self, data: ImageData) -> Normalised:
        """The net for such images and classes with new weights; an own factory is imported and run.

        Raises:
            SettingError: the net cannot be made, see `bimask.nets.build_net`.
            VictimError: the file of an own net is another one than when the spec was made.
        """
        how = self.normalise or ("none" if self.weights or is_own(self.net) else "dataset")
        channels = data.images.shape[1]
        if how == "dataset":
            mean, std = statistics(data)
        elif how == "none":
            mean, std = [0.0] * channels, [1.0] * channels
        else:
            mean, std = how.mean, how.std
        height, width = data.images.shape[-2:]
        size = height if height == width else (height, width)
        return self.with_door(self.net_of(mean, std, channels, data.num_classes, size), size)

    def with_door(self, model: Normalised, size: Size | None) -> Normalised:
        """The model itself, behind a door (`bimask.nets.admission`) if it is of an own factory, which
        may answer with a tuple or with probabilities; made up images tell.

        Raises:
            ModelError: it cannot be defended as it is.
        """
        if is_own(self.net) and size is not None:
            shape = (4, model.mean.shape[1], *height_and_width(size))
            images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
            admit(model, images).door.install(model)
        return model

    def net_of(
        self, mean: list[float], std: list[float], channels: int, classes: int, size: Size | None
    ) -> Normalised:
        """The same with given statistics; `size` is (height, width) or the side of a square, None
        where it is not known."""
        if len(mean) != channels:
            raise SettingError(f"`normalise` needs {channels} values, one a channel, got {mean}.")
        if self.net_sha256 is not None and file_sha256(source_of(self.net)) != self.net_sha256:
            raise VictimError(
                f"The code of the net {self.net!r} changed since the victim was made; put the old file "
                "back, or make the victim anew."
            )
        return build_net(
            self.net,
            in_channels=channels,
            num_classes=classes,
            width=self.width,
            image_size=size,
            mean=mean,
            std=std,
        )

    def require_at_most(self, numbers: int, channels: int, classes: int, size: Size | None) -> None:
        """Refuse a net that is larger than its file of weights, before memory is taken for it.

        Own nets are let pass: their code is trusted, or was not run.

        Raises:
            VictimError: it has more than so many numbers.
            SettingError: it cannot be made.
        """
        if is_own(self.net):
            return
        with torch.device("meta"):
            net = self.net_of([0.0] * channels, [1.0] * channels, channels, classes, size)
        asked = sum(value.numel() for value in net.state_dict().values())
        if asked > numbers:
            raise VictimError(
                f"{self.net} of width {self.width} for {classes} classes has {asked} numbers, but its "
                f"file of weights holds {numbers}: they do not fit."
            )


def statistics(data: ImageData) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation in [0, 1] units; a constant channel gets 1."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in data.images.cpu().unbind(1):  # by histogram: no copy of the data as floats
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        mean = counts @ values / channel.numel()
        std = (counts @ (values - mean) ** 2 / max(1, channel.numel() - 1)).sqrt()
        means.append(mean.item())
        stds.append(std.item() if std > 0 else 1.0)
    return means, stds
