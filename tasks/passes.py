"""What the passes of a benchmark session beside the timed queries found: queries in flight, power, trtexec, sensors.

Each keeps all that the target told, for the artifact; the fields named here are those that metrics come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import load_file

from jetway.tasks.artifacts import Tensors
from jetway.tasks.target_info import SUM_OF_RAILS

Metrics = dict[str, float | None]
#: Times of samples in the sensors' file, in seconds of the target's monotonic clock.
TIME_COLUMN = "time_s"
#: Samples of each sensor in MLflow at most; the file has them all.
MAX_POINTS = 200


#: Of figures that no monitor of the whole measured.
SUMMED = "power figures are a sum of rails: this board measures no total"


class _Pass(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class InFlight(_Pass):
    """The scenario throughput: queries enqueued behind each other, by the GPU's own clock. Times in ms."""

    queries_per_s: float
    latency_ms: dict[str, float] = Field(description="Transfers and compute of a query, without its waiting.")
    gpu_compute_ms: dict[str, float]
    warnings: tuple[str, ...] = ()

    def metrics(self, batch_size: int) -> Metrics:
        return {
            "in_flight_samples_per_s": self.queries_per_s * batch_size,
            "in_flight_latency_ms_p50": self.latency_ms["median"],
            "in_flight_latency_ms_p99": self.latency_ms["p99"],
            "in_flight_gpu_compute_ms_p50": self.gpu_compute_ms["median"],
        }


class Power(_Pass):
    """The power pass of one variant: queries back to back, apart from any that are timed."""

    total: str = Field(
        description="What the figures are of: a rail, sum_of_rails, or gpu for a graphics card."
    )
    power_w_mean: float | None
    power_w_peak: float | None
    idle_power_w_mean: float | None = Field(description="Of the machine at rest before.")
    energy_mj_per_inference: float | None = Field(description="All that the total drew.")
    energy_above_idle_mj_per_inference: float | None = Field(
        description="What the variant added to the rest."
    )
    inferences_per_joule: float | None
    reasons: tuple[str, ...] = Field(default=(), description="Why the figures are doubtful; none when not.")

    def metrics(self) -> Metrics:
        """None is stated where there are reasons to doubt it; the figures themselves are kept all the same."""
        figures: Metrics = {
            "power_w_mean": self.power_w_mean,
            "power_w_peak": self.power_w_peak,
            "power_w_idle": self.idle_power_w_mean,
            "energy_mj_per_inference": self.energy_mj_per_inference,
            "energy_above_idle_mj_per_inference": self.energy_above_idle_mj_per_inference,
            "inferences_per_joule": self.inferences_per_joule,
        }
        return dict.fromkeys(figures) if self.reasons else figures


class PowerPass(_Pass):
    """The power pass of a session."""

    variants: dict[str, Power]
    unmeasured: dict[str, str] = Field(default_factory=dict, description="Why a variant is not among them.")
    samples: Tensors = Field(description="As those of Telemetry, with power_w of each rail.")

    def notes(self, variant: str) -> list[str]:
        """Why a variant has no power figures; of figures that are a sum, that they are."""
        power = self.variants.get(variant)
        reasons = power.reasons if power else [self.unmeasured[variant]] if variant in self.unmeasured else []
        if power and power.total == SUM_OF_RAILS and not reasons:
            return [SUMMED]
        return [f"no power figures: {reason}" for reason in reasons]


class Telemetry(_Pass):
    """Sensors over the whole session."""

    samples: Tensors = Field(description="time_s and a column for each sensor, float64, NaN where unread.")
    summary: dict[str, Any]
    notes: tuple[str, ...] = Field(default=(), description="What was seen and is no reason for doubt.")


def read_series(path: Path, max_points: int = MAX_POINTS) -> tuple[list[float], dict[str, list[float]]]:
    """Times and columns of a sensors' file, thinned out to ``max_points``: what a chart can show."""
    arrays = load_file(path)
    times = arrays.pop(TIME_COLUMN)
    kept = np.unique(np.linspace(0, len(times) - 1, min(len(times), max_points)).round().astype(int))
    return times[kept].tolist(), {name: column[kept].tolist() for name, column in sorted(arrays.items())}


def dla_layers_ratio(passport: Mapping[str, Any]) -> float | None:
    """Share of an engine's layers that a DLA runs; None for an engine that asked for none.

    TensorRT's passport places layer by layer; ONNX Runtime's counts operators, and has no DLA.
    """
    placement = passport.get("placement")
    if not isinstance(placement, list) or not placement:
        return None
    return float(sum(entry["device"] == "DLA" for entry in placement) / len(placement))


def provider_notes(passport: Mapping[str, Any]) -> list[str]:
    """What of an ONNX Runtime engine ran on another provider than the one that was asked for."""
    placement = passport.get("placement")
    if not isinstance(placement, dict):
        return []
    first, total = passport["load_options"]["providers"][0], sum(placement.values())
    return [
        f"{count} of {total} kernels ran on {name}, not on {first}"
        for name, count in sorted(placement.items())
        if name != first
    ]


def trtexec_ratio(in_flight: InFlight | None, trtexec: Mapping[str, Any]) -> float | None:
    """Our median of the GPU's compute over trtexec's; None where one of them was not measured."""
    theirs: float | None = (trtexec.get("gpu_compute_ms") or {}).get("median")
    return in_flight.gpu_compute_ms["median"] / theirs if in_flight and theirs else None
