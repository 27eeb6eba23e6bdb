"""The rules by which trials are stopped early; `study.trial.history` applies them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(gt=0, lt=1)]


class Halving(BaseModel):
    """Successive halving within a victim."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    shares: list[Share] = Field(
        default=[0.5, 0.75], min_length=1, description="of a trial's rounds, where it is looked at"
    )
    reduction: float = Field(2.0, gt=1, description="one in so many goes on, and all of a tied rank")
    grace: int = Field(
        8, ge=2, description="trials that are seen at a rung before any is stopped there"
    )


class EarlyStopping(BaseModel):
    """Which trials are stopped before their end; a stopped one is PRUNED and has no objectives."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    dominated: bool = Field(True, description="between victims, once certainly dominated")
    halving: Halving | None = Field(None, description="null: never within a victim")
