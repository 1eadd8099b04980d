"""Metrics: a name, a direction, and how per-sample records become one value."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Metric(BaseModel):
    """A figure of task quality that a workload reports. ``top1`` and its kind are fractions from 0 to 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    higher_is_better: bool = True
    description: str = ""
    best: float | None = Field(
        default=None, description="What nothing can beat, as 1 is of a share; no interval is drawn beyond it."
    )
