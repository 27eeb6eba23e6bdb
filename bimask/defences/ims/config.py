"""Every setting of IMS, checked where it is read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import Self

from bimask.defences.ims.synthesis import InnerOptimizer, Norm
from bimask.defences.settings import DefenceConfig, Search
from bimask.metrics.agreement import LossForm

Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


# What prepares the one net that all members of a population share.
ENGINE = ("sites", "precision", "memory_format", "fold_batch_norm", "compile", "images_per_pass")


# Settings by the name of what they are for; `benchmarks/` holds the ablation of each.
PROFILES: dict[str, dict[str, Any]] = {
    "paper": {},
    "fast": {
        "precision": "bfloat16",
        "images_per_pass": "device",
        "loss_form": "log",
        "keep": "average",
        "patience": None,
        "initialise_rounds": 8,
        "minimise_rounds": 8,
        "select_rounds": 32,
        "mask_lr": 0.1,
        "selection_weight": 3.0,
        "clean_weight": 8.0,
        "sharpness": 9.0,
        "initial_selection": 0.95,
        "inner_optimizer": "sign",
        "inner_steps": 1,
        "step_size": None,
        "budget": 0.7,
        "clip_images": True,
        "warm_start": 0.8,
        "universal": 0.3,
        "shift": 1,
    },
}


# For a net that nobody tuned: every kind of site, and triggers searched beforehand. benchmarks/zoo.md.
PROFILES["robust"] = PROFILES["fast"] | {
    "sites": "all",
    "class_triggers": 0.8,
    "clean_weight": 4.0,
    "shift": "auto",
    "flip": "auto",
}


class BudgetWarning(UserWarning):
    """The perturbation budget cannot be reached with these steps, so it bounds nothing."""


class PurifyConfig(DefenceConfig):
    """Every setting of IMS; the defaults are the published ones.

    `step_size` null means budget / inner_steps, so that the budget is just reached. `patience` null
    means that every stage runs all its rounds. Budgets and steps are in [0, 1] pixel units.
    """

    PROFILES = PROFILES

    sites: Literal["published", "all"] | tuple[str, ...] = Field(
        "published",
        description="what is masked: convolutions, or a transformer's blocks (published); linear "
        "layers and attention heads too (all); or kinds and names of sites, with *",
    )
    sharpness: Annotated[Positive, Search(5.0, 50.0, log=True)] = Field(
        20.0, description="k, the slope of the mask's sigmoid"
    )
    mask_estimator: Literal["soft", "straight_through"] = Field(
        "soft", description="straight_through: 0 or 1 in the forward pass, the soft slope backward"
    )
    initial_mask: Unit = Field(1.0, description="a at the start")
    initial_selection: Unit = Field(1.0, description="s at the start; below 1, a has a gradient")
    mask_lr: Annotated[Positive, Search(0.01, 0.3, log=True)] = Field(
        0.02, description="AdamW's rate on masks and selections"
    )
    mask_lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="cosine: from mask_lr to 0 over the rounds of select"
    )
    weight_decay: NonNegative = Field(0.01, description="AdamW's on masks and selections")
    selection_weight: Annotated[NonNegative, Search(0.3, 30.0, log=True)] = Field(
        10.0, description="lambda of initialise and select"
    )
    initialise_rounds: int = Field(100, ge=0, description="of the first stage, without triggers")
    minimise_rounds: int = Field(200, ge=0, description="of the second stage")
    select_rounds: int = Field(200, ge=0, description="of the third stage, with the selection cost")
    patience: int | None = Field(25, ge=0, description="rounds without progress a stage bears")
    threshold: float = Field(0.98, gt=0, le=1, description="progress: loss < threshold x best")
    keep: Literal["last", "best", "average"] = Field(
        "last",
        description="what a stage hands on; average: of select, the mean of its second half",
    )
    batch_size: int = Field(256, ge=1, description="images drawn anew for each round")
    loss_form: LossForm = Field(
        "paper", description="log: the same losses in log space, exact at any margin"
    )
    clean_weight: Annotated[NonNegative, Search(1.0, 16.0, log=True)] = Field(
        1.0, description="of agree(f_a(x), f(x)) in the outer loss"
    )
    inverse_weight: NonNegative = Field(
        1.0,
        description="of all terms of the inverse mask, in both problems; 0 is the ablation without it",
    )
    learn_selection: bool = Field(
        True,
        description="false holds s at initial_selection; with 0 there, the ablation of the mask alone",
    )
    inner_steps: Annotated[int, Search(1, 8)] = Field(
        20, ge=1, description="of the inner problem, each round"
    )
    step_size: Positive | None = Field(0.001, description="of one inner step")
    budget: Annotated[Positive, Search(0.05, 1.0, log=True)] = Field(
        1.0, description="largest perturbation"
    )
    norm: Norm = Field("linf", description="that the budget bounds, of an image")
    inner_optimizer: InnerOptimizer = Field("adamw", description="of the inner problem")
    inner_weight_decay: NonNegative = Field(0.01, description="AdamW's on the perturbation")
    clip_images: bool = Field(False, description="keep perturbed images in [0, 1]")
    warm_start: Unit = Field(0.0, description="share of images whose perturbation goes on, not from 0")
    universal: Unit = Field(0.0, description="share of images that get one perturbation in common")
    universal_budget: Positive | None = Field(
        None, description="largest perturbation in common; null is budget"
    )
    class_triggers: Unit = Field(
        0.0,
        description="share of images that get a trigger towards one class, searched before",
    )
    shift: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0,
        description="clean images shifted anew each round, pixels at most; auto: a tenth of their side "
        "where flipping is natural, else 1",
    )
    flip: bool | Literal["auto"] = Field(
        False,
        description="clean images flipped at random each round; auto: where that is natural, since the "
        "suspect answers flipped images as it does the others",
    )
    early_batch_size: int | None = Field(
        None, ge=1, description="images a round of initialise and minimise; null is batch_size"
    )
    inner_steps_at_start: int | None = Field(
        None, ge=1, description="inner steps of the first triggered round; they grow to inner_steps"
    )
    inner_momentum: float = Field(0.0, ge=0, lt=1, description="of sign steps")
    reuse_last_pass: bool = Field(
        False, description="learn masks on the perturbation of the last inner pass, one step behind"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the passes; bfloat16 where the device has instructions for it"
    )
    memory_format: Literal["channels_last", "contiguous"] = Field(
        "channels_last", description="of images and weights in the passes"
    )
    fold_batch_norm: bool = Field(
        True, description="into masked convolutions, where they can be traced"
    )
    compile: bool = Field(False, description="torch.compile of the passes")
    images_per_pass: Annotated[int, Field(ge=1)] | Literal["batch", "device"] = Field(
        "batch", description="of an outer pass; batch: one batch a member, device: what it is good for"
    )

    def inner_steps_at(self, progress: float) -> int:
        """Inner steps at a share `progress` in [0, 1] of the rounds with triggers."""
        if self.inner_steps_at_start is None:
            return self.inner_steps
        grown = progress * (self.inner_steps - self.inner_steps_at_start)
        return round(self.inner_steps_at_start + grown)

    @property
    def budgets(self) -> tuple[float, float]:
        """Of an image's own perturbation, and of the one in common."""
        return self.budget, self.universal_budget or self.budget

    def step_sizes(self, steps: int) -> tuple[float, float]:
        """The length of one of `steps` inner steps, for the two budgets."""
        own, common = self.budgets
        if self.step_size is not None:
            return self.step_size, self.step_size
        return own / steps, common / steps

    @property
    def augments(self) -> bool:
        """Whether a round sees the clean images changed."""
        return bool(self.flip) or self.shift != 0

    def shift_of(self, side: int, *, natural: bool) -> int:
        """Pixels at most, of images whose shorter side is `side`."""
        if self.shift == "auto":
            return max(1, side // 10) if natural else 1
        return self.shift

    def flips(self, *, natural: bool) -> bool:
        """Whether images are flipped."""
        return natural if self.flip == "auto" else self.flip

    @property
    def straight_through(self) -> bool:
        """Whether masks decide every channel."""
        return self.mask_estimator == "straight_through"

    @property
    def resolved_step_size(self) -> float:
        """The length of one of all inner steps."""
        return self.step_sizes(self.inner_steps)[0]

    def steps(self, images: int) -> int:
        """Rounds of all stages, at most."""
        return self.initialise_rounds + self.minimise_rounds + self.select_rounds

    def samples(self, count: int, images: int) -> list[tuple[Self, int]]:
        """Rounds without triggers, and rounds with them."""
        none = {"initialise_rounds": 0, "minimise_rounds": 0, "select_rounds": 0, "patience": None}
        return [
            (self.model_copy(update=none | {"initialise_rounds": count}), self.initialise_rounds),
            (
                self.model_copy(update=none | {"select_rounds": count}),
                self.minimise_rounds + self.select_rounds,
            ),
        ]

    def unprepared(self) -> Self:
        """Without triggers of a pool."""
        return self.model_copy(update={"class_triggers": 0.0})

    def warnings(self) -> list[str]:
        """A budget that cannot be reached."""
        problem = self.unreachable_budget()
        return [] if problem is None else [problem]

    def unreachable_budget(self) -> str | None:
        """One sentence if step size x steps cannot reach the budget, else None.

        A step of AdamW or of the sign moves a pixel by about the step size at most, so the reach
        bounds the perturbation before the budget does. Under "l2" only sign steps have such a bound.
        """
        if self.warm_start:
            return None  # the next round goes on from where this one ends
        reach = self.resolved_step_size * self.inner_steps
        bounded = self.norm == "linf" or self.inner_optimizer == "sign"
        budget = max(self.budgets)
        if self.step_size is None or not bounded or reach >= budget * (1 - 1e-9):
            return None
        name = "budget" if budget == self.budget else "universal_budget"
        return (
            f"The {name} {budget:g} is never reached: {self.inner_steps} steps of "
            f"{self.resolved_step_size:g} end at {reach:g} at most; raise `step_size` or "
            f"`inner_steps`, or lower `{name}` to {reach:g}."
        )
