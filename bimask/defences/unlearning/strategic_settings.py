"""The settings of strategic retraining."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bimask.defences.loop import steps_an_epoch
from bimask.defences.settings import DefenceConfig, Search
from bimask.inspection.neuron_triggers import Kind


class StrategicConfig(DefenceConfig):
    """The settings of strategic retraining; what the paper did not say is our choice, as noted."""

    reach: Annotated[
        float,
        Field(gt=0, description="times the 99.9th percentile of a layer that a channel is set to"),
        Search(1.0, 8.0, log=True),
    ] = 2.0  # ABS: 8 on CIFAR-10, 2 on TrojAI, 1 in TrojanZoo
    values: int = Field(4, ge=2, description="values that a channel is set to, from 0")  # ABS: 3 or 5
    unanimity: float = Field(
        0.9, gt=0, le=1, description="share of the images that a candidate leads to one class, at least"
    )
    top_k: int = Field(20, ge=1, description="candidates that a trigger is searched for, at most")
    candidates: Literal["neurons", "classes"] = Field(
        "neurons", description="whether triggers are searched for neurons, or for classes (an ablation)"
    )
    kind: Kind = Field("patch", description="what a searched trigger is")
    max_size: Annotated[
        float,
        Field(gt=0, le=1, description="share of a picture that a trigger may change"),
        Search(0.01, 0.15),
    ] = 0.06  # ABS on CIFAR-10: 64 of 1,024 pixels
    trigger_steps: Annotated[
        int, Field(ge=1, description="of Adam, for each trigger"), Search(30, 200, log=True)
    ] = 200  # ABS: 50 to 1,000
    trigger_lr: float = Field(0.1, gt=0, description="of Adam, for a trigger")
    # without it a neuron may be driven up by a picture that does not reach its class
    target_weight: float = Field(1.0, ge=0, description="weight of the class in a trigger's loss")
    # a trigger of twice the size costs more than all that it can gain
    size_weight: float = Field(10.0, ge=0, description="weight of a trigger's size beyond its bound")
    min_success: Annotated[
        float,
        Field(
            ge=0, le=1, description="share of other clean images that a Trojan neuron's trigger moves"
        ),
        Search(0.6, 0.95),
    ] = 0.8
    top_p: Annotated[
        float, Field(gt=0, le=1, description="share of `top_p_rule` that is affected"), Search(0.2, 1.0)
    ] = 0.5  # unpublished: half
    top_p_rule: Literal["rates", "classes"] = Field(
        "rates",
        description="whether the affected classes are the fewest with that share of all flip rates, or "
        "the first of that share of the classes",
    )
    rounds: int = Field(5, ge=1, description="of search and retraining, at most")
    epochs: int = Field(5, ge=1, description="times that every clean image is seen, each round")
    # unpublished; what fine-tuning takes
    lr: Annotated[float, Field(gt=0, description="of SGD"), Search(1e-3, 3e-2, log=True)] = 0.01
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(0.0, ge=0, description="of SGD")
    batch_size: int = Field(64, ge=2, description="images a step, stamped ones among them")
    stamped_share: float = Field(0.5, gt=0, lt=1, description="share of a batch that carries a trigger")
    jitter: int = Field(2, ge=0, description="pixels that a stamped trigger is moved by at most")
    accuracy_drop: float = Field(
        0.05, ge=0, le=1, description="accuracy on held-out clean images that may be lost"
    )
    shift: int = Field(0, ge=0, description="pixels that images are shifted by at most, anew each step")
    flip: bool = Field(False, description="whether half of the images are flipped, anew each step")

    @property
    def clean_batch(self) -> int:
        """Images of a batch that carry no trigger."""
        return max(1, round(self.batch_size * (1 - self.stamped_share)))

    def steps(self, images: int) -> int:
        """At most: one a search, and the batches of all epochs."""
        return self.rounds * (1 + self.epochs * steps_an_epoch(images, self.clean_batch))
