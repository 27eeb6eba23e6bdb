"""What a configuration must show before it is promoted: limits as data.

A gate that the study's YAML leaves out is not there; one whose evidence is missing fails
(`study.promotion.evidence`).
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Gates(BaseModel):
    """Limits. Rates are of the worst victim of a role, each the mean over its seeds, on `test`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    accuracy_drop: float | None = Field(None, ge=0, le=1, description="of tuning victims, at most")
    attack_success: float | None = Field(None, ge=0, le=1, description="of tuning victims, at most")
    held_out_attack_success: float | None = Field(None, ge=0, le=1, description="at most")
    control_accuracy_drop: float | None = Field(None, ge=0, le=1, description="at most")
    spread: float | None = Field(
        None, ge=0, le=1, description="standard deviation of a victim's ASR over seeds, at most"
    )
    seeds: int = Field(3, ge=2, description="of every victim, at least")
