"""What a run measured: one frozen row a variant and target, as the table, the gates and MLflow read it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from jetway.tasks.artifacts import SCHEMA_VERSION
from jetway.tasks.metrics import Metric

Interval = tuple[float, float]

#: The variant that every ratio and drop refers to, on its own target.
BASELINE = "baseline-fp32"

#: Names that every variant may have, besides the workload's own metrics.
MEASURED_METRICS = (
    "params",
    "macs",
    "size_bytes",
    "latency_ms_p50",
    "latency_ms_p90",
    "latency_ms_p95",
    "latency_ms_p99",
    "latency_ms_mean",
    "latency_ms_stdev",
    "throughput_samples_per_s",
    "peak_memory_mib",
    "device_memory_mib",
    "build_s",
    "integer_macs_ratio",
    "dla_layers_ratio",
    # queries in flight (scenario throughput), which says nothing of the time that one query takes alone
    "in_flight_samples_per_s",
    "in_flight_latency_ms_p50",
    "in_flight_latency_ms_p99",
    "in_flight_gpu_compute_ms_p50",
    "trtexec_gpu_compute_ratio",
    # of frames, from capture to results
    "capture_ms_p50",
    "preprocess_ms_p50",
    "infer_ms_p50",
    "postprocess_ms_p50",
    "end_to_end_ms_p50",
    "end_to_end_ms_p99",
    "stream_fps",
    "stream_fps_pipelined",
    # of a cascade: both engines and what stands around them, end to end
    "cascade_map50_95",
    "cascade_map50",
    "cascade_map50_95_drop",
    "cascade_map50_drop",
    "cascade_size_bytes",
    "cascade_size_ratio",
    "cascade_ms_p50",
    "cascade_ms_p99",
    "cascade_ms_p50_ratio",
    "cascade_fps",
    "cascade_detect_ms_p50",
    "cascade_boxes_ms_p50",
    "cascade_crop_ms_p50",
    "cascade_classify_ms_p50",
    # of the power pass
    "power_w_mean",
    "power_w_peak",
    "power_w_idle",
    "energy_mj_per_inference",
    "energy_above_idle_mj_per_inference",
    "inferences_per_joule",
)
#: Ratios to baseline-fp32 on the same target, and the metric that each divides.
RATIO_METRICS = {
    "params_ratio": "params",
    "macs_ratio": "macs",
    "size_ratio": "size_bytes",
    "latency_p50_ratio": "latency_ms_p50",
}
#: Prefixes of what a benchmark session measures; an invalid session says nothing about these.
TIMING_PREFIXES = (
    "latency_",
    "throughput_",
    "in_flight_",
    "trtexec_",
    "capture_",
    "preprocess_",
    "infer_",
    "postprocess_",
    "end_to_end_",
    "stream_",
    *(f"cascade_{name}" for name in ("ms_", "fps", "detect_", "boxes_", "crop_", "classify_")),
    "power_",
    "energy_",
    "inferences_per_joule",
)


class Verdict(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    UNKNOWN = "UNKNOWN"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Validity(_Value):
    """Whether a measurement supports the statements made of it, and if not, why."""

    valid: bool = True
    reasons: tuple[str, ...] = ()

    def joined(self, other: Validity) -> Validity:
        """Of both together."""
        return Validity(valid=self.valid and other.valid, reasons=self.reasons + other.reasons)


class GateVerdict(_Value):
    """One gate applied to one row. UNKNOWN: the evidence does not decide."""

    name: str
    metric: str
    limit: float
    value: float | None
    interval: Interval | None = None
    verdict: Verdict

    @property
    def passed(self) -> bool:
        return self.verdict is Verdict.PASS


class VariantResult(_Value):
    """One row of the stage table. A metric that was not measured is absent or ``None``, never a guess."""

    variant: str
    target: str
    precision: str
    engine: str
    board: str = Field(description="The machine, named as its probe names it.")
    simulated: bool = Field(default=False, description="No real device: its figures say nothing of one.")
    metrics: dict[str, float | None] = Field(default_factory=dict)
    intervals: dict[str, Interval] = Field(
        default_factory=dict, description="95 % intervals (low, high) by metric name."
    )
    validity: Validity = Validity()
    notes: tuple[str, ...] = Field(default=(), description="What else a reader of the figures should know.")
    gates: tuple[GateVerdict, ...] = ()

    def value(self, metric: str) -> float | None:
        return self.metrics.get(metric)

    def measured(self) -> dict[str, float]:
        """The metrics that have a value, as MLflow logs them."""
        return {name: value for name, value in self.metrics.items() if value is not None}


class TargetStatus(StrEnum):
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    QUARANTINED = "QUARANTINED"


class TargetOutcome(_Value):
    """How a target of a run ended: by its own gates, or with the error that left it without a result.

    One in quarantine was not run on, and ``error`` says why.
    """

    name: str
    status: TargetStatus
    error: str = ""
    exit_code: int
    plan_b: str = Field(
        default="", description="The fallback that passed the gates, where the recipe did not."
    )

    @property
    def told(self) -> str:
        """What went wrong there, with its name."""
        return self.error if self.error.startswith(f"{self.name}:") else f"{self.name}: {self.error}"


def without_result(outcomes: Sequence[TargetOutcome]) -> list[TargetOutcome]:
    return [one for one in outcomes if one.status is not TargetStatus.FINISHED]


def failed(outcomes: Sequence[TargetOutcome]) -> list[TargetOutcome]:
    return [one for one in outcomes if one.status is TargetStatus.FAILED]


def drop_name(metric: Metric) -> str:
    """Name of what a metric lost against the baseline; above 0 is worse, whatever its direction."""
    return f"{metric.name}_drop"


def metric_names(metrics: Sequence[Metric]) -> tuple[str, ...]:
    """Every metric name that a row of a workload with these metrics can have."""
    own = [metric.name for metric in metrics]
    drops = [drop_name(metric) for metric in metrics]
    return (*MEASURED_METRICS, *own, *drops, *RATIO_METRICS)


def dump_rows(rows: Sequence[VariantResult], metrics: Sequence[Metric]) -> dict[str, Any]:
    """The rows and the workload's metrics as JSON."""
    return {
        "schema_version": SCHEMA_VERSION,
        "task_metrics": [metric.model_dump(mode="json") for metric in metrics],
        "variants": [row.model_dump(mode="json") for row in rows],
    }


def load_rows(value: Any) -> tuple[list[VariantResult], list[Metric]]:
    """What ``dump_rows`` wrote."""
    rows = [VariantResult.model_validate(row) for row in value["variants"]]
    return rows, [Metric.model_validate(metric) for metric in value["task_metrics"]]
