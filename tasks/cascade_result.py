"""What a detector and a classifier behind it give together: accuracy end to end, and time by step."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from jetway.tasks.artifacts import SCHEMA_VERSION, Report, Tensors
from jetway.tasks.measurement import LatencySummary
from jetway.tasks.results import Interval, Validity
from jetway.tasks.stream_result import END_TO_END, Rate

STEPS = ("capture", "detect", "boxes", "crop", "classify")


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VariantCascade(_Value):
    """Both engines of one variant."""

    steps: dict[str, LatencySummary] = Field(description="Of each step, and end_to_end, a frame each.")
    fps: Rate
    scores: dict[str, float] = Field(
        description="The detector's metrics, of boxes that the classifier named."
    )
    drops: dict[str, tuple[float, Interval]] = Field(
        description="What each metric lost against the first variant, and its 95 % interval."
    )
    objects: int = Field(description="Boxes that were classified, over all samples.")
    size_bytes: int = Field(description="Of both engines.")
    size_ratio: float
    p50_ratio: float = Field(description="Of the end-to-end median, against the first variant.")
    records: Report

    def metrics(self) -> dict[str, float | None]:
        """By the names that the stage table and MLflow use."""
        whole = self.steps[END_TO_END]
        return {
            **{f"cascade_{name}": value for name, value in self.scores.items()},
            **{f"cascade_{name}_drop": drop for name, (drop, _) in self.drops.items()},
            **{f"cascade_{step}_ms_p50": self.steps[step].p50_ms for step in STEPS if step != "capture"},
            "cascade_ms_p50": whole.p50_ms,
            "cascade_ms_p99": whole.p99_ms,
            "cascade_ms_p50_ratio": self.p50_ratio,
            "cascade_fps": self.fps.value,
            "cascade_size_bytes": float(self.size_bytes),
            "cascade_size_ratio": self.size_ratio,
        }

    def intervals(self) -> dict[str, Interval]:
        """95 % intervals, by the same names."""
        drops = {f"cascade_{name}_drop": interval for name, (_, interval) in self.drops.items()}
        median = self.steps[END_TO_END].intervals_ms["p50"]
        return {**drops, "cascade_ms_p50": median, "cascade_fps": self.fps.interval}


class CascadeResult(_Value):
    """One session of frames through both engines of every variant, in turns."""

    schema_version: int = SCHEMA_VERSION
    target: str
    variants: dict[str, VariantCascade]
    validity: Validity
    simulated: bool = False
    samples: Tensors = Field(description="NAME.STEP_ns (int64) and NAME.round (int32) of every frame.")
    rounds: int
    excluded_rounds: tuple[int, ...]
    boot_id: str


def cascade_markdown(result: CascadeResult, *, where: str) -> str:
    """Accuracy end to end, milliseconds at the median by step, and frames a second, a row for each variant."""
    first = next(iter(result.variants.values()))
    titles = ("variant", *first.scores, *STEPS, "end to end", "FPS", "bytes")
    invalid = "" if result.validity.valid else f" (INVALID: {'; '.join(result.validity.reasons)})"
    lines = [
        f"**Detector and classifier as one on {where}**: ms at the median{invalid}",
        "",
        f"| {' | '.join(titles)} |",
        f"| :-- |{' --: |' * (len(titles) - 1)}",
    ]
    return "\n".join([*lines, *(_line(name, found) for name, found in result.variants.items())]) + "\n"


def _line(name: str, found: VariantCascade) -> str:
    scores = [f"{value:.4f}" for value in found.scores.values()]
    medians = [f"{found.steps[step].p50_ms:.3f}" for step in (*STEPS, END_TO_END)]
    return f"| {' | '.join([name, *scores, *medians, f'{found.fps.value:.1f}', str(found.size_bytes)])} |"
