"""What was measured on a target: frozen values with units in their names, made of a session's samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import load_file

from jetway.tasks.artifacts import SCHEMA_VERSION, Report, Tensors
from jetway.tasks.layer_table import Layer
from jetway.tasks.passes import InFlight, PowerPass, Telemetry, trtexec_ratio
from jetway.tasks.results import Interval, Validity
from jetway.tasks.statistics import (
    Integers,
    paired_ratio,
    percentile,
    percentile_intervals,
    round_medians,
    supports,
)

NS_PER_MS = 1e6
#: Latencies in ns, and the round of each.
Samples = tuple[Integers, Integers]
PERCENTS = (50, 90, 95, 99)


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LatencySummary(_Value):
    """Latency of one query in milliseconds. A percentile without enough queries behind it is None.

    Percentiles are nearest-rank: each is a latency that occurred. Intervals are 95 %, by bootstrap over
    rounds.
    """

    count: int
    timed_s: float = Field(description="Sum of the timed queries.")
    mean_ms: float
    stdev_ms: float
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    intervals_ms: dict[str, Interval] = Field(default_factory=dict, description="By name: p50, p90, ...")

    @classmethod
    def of(cls, latencies_ns: Integers, rounds: Integers, *, seed: int = 0) -> LatencySummary:
        """Summary of all timed queries of one engine."""
        stated = [percent for percent in PERCENTS if supports(len(latencies_ns), percent)]
        intervals = percentile_intervals(latencies_ns, rounds, stated, seed=seed)
        values = {percent: percentile(latencies_ns, percent) / NS_PER_MS for percent in stated}
        return cls(
            count=len(latencies_ns),
            timed_s=float(latencies_ns.sum()) / 1e9,
            mean_ms=float(latencies_ns.mean()) / NS_PER_MS,
            stdev_ms=float(latencies_ns.std(ddof=1)) / NS_PER_MS,
            p50_ms=values.get(50),
            p90_ms=values.get(90),
            p95_ms=values.get(95),
            p99_ms=values.get(99),
            intervals_ms={
                f"p{p}": (low / NS_PER_MS, high / NS_PER_MS) for p, (low, high) in intervals.items()
            },
        )


class Ratio(_Value):
    """A variant's p50 against the first variant's: median over the rounds of their paired ratio."""

    value: float
    interval: Interval


class VariantMeasurement(_Value):
    """One variant in a session."""

    variant: str
    latency: LatencySummary
    throughput_samples_per_s: float = Field(
        description="Samples over the timed seconds, one query at a time."
    )
    peak_memory_mib: float | None = Field(
        description="Peak of a process that only runs the engine: interpreter, runtime, engine and buffers."
    )
    engine_memory_mib: float | None = Field(description="What loading and running the engine added to it.")
    device_memory_mib: float | None = Field(
        default=None,
        description="What it added on the GPU, whose memory may be the host's; None without one.",
    )
    drift_ratio: float = Field(description="Change against the canary, first third of the session to last.")
    p50_ratio: Ratio

    def metrics(self) -> dict[str, float | None]:
        """By the names that the stage table and MLflow use."""
        return {
            "latency_ms_p50": self.latency.p50_ms,
            "latency_ms_p90": self.latency.p90_ms,
            "latency_ms_p95": self.latency.p95_ms,
            "latency_ms_p99": self.latency.p99_ms,
            "latency_ms_mean": self.latency.mean_ms,
            "latency_ms_stdev": self.latency.stdev_ms,
            "throughput_samples_per_s": self.throughput_samples_per_s,
            "peak_memory_mib": self.peak_memory_mib,
            "device_memory_mib": self.device_memory_mib,
            "latency_p50_ratio": self.p50_ratio.value,
        }

    def intervals(self) -> dict[str, Interval]:
        """95 % intervals, by the same names."""
        percentiles = {f"latency_ms_{name}": span for name, span in self.latency.intervals_ms.items()}
        return {**percentiles, "latency_p50_ratio": self.p50_ratio.interval}


class MachineState(BaseModel):
    """How busy, fast and hot the target was. What its kernel does not tell is None or empty."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    load_average: tuple[float, float, float]
    frequencies_mhz: dict[str, list[float | str | None]]
    throttle_events: int | None
    stolen_ms: float | None = Field(
        description="Time a hypervisor gave to others, since boot, over all cores."
    )
    temperatures_c: dict[str, float]
    memory_available_mib: float | None


class BenchmarkResult(_Value):
    """One session on one target: all its variants, measured side by side."""

    schema_version: int = SCHEMA_VERSION
    target: str
    variants: dict[str, VariantMeasurement] = Field(description="In the recipe's order, the reference first.")
    validity: Validity
    simulated: bool = Field(default=False, description="No real device: its figures say nothing of one.")
    samples: Tensors = Field(
        description="NAME.latency_ns (int64) and NAME.round (int32) of every timed query."
    )
    canary: LatencySummary
    canary_drift_ratio: float
    rounds: int
    excluded_rounds: tuple[int, ...] = Field(
        description="Rounds in which other processes held the CPU, by the scheduler's account. No figure "
        "counts them; their samples are kept."
    )
    extensions: int = Field(description="How often the session went on because it was not valid yet.")
    slice_s: float
    seed: int = Field(description="Of the order of the slices.")
    machine_before: MachineState
    machine_after: MachineState
    boot_id: str
    batch_size: int = Field(default=1, description="Samples of one query.")
    in_flight: dict[str, InFlight] = Field(
        default_factory=dict, description="Scenario throughput, by variant."
    )
    power: PowerPass | None = None
    power_mode: dict[str, Any] | None = Field(
        default=None, description="The power mode and clocks that were asked for, found, set and put back."
    )
    trtexec: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="The target's trtexec on the same engines, by variant."
    )
    layers: dict[str, tuple[Layer, ...]] = Field(
        default_factory=dict, description="Layers of TensorRT engines with their times, by variant."
    )
    left_out: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="Passes that the engine of a variant cannot take, by variant."
    )
    telemetry: Telemetry | None = None

    def metrics(self, variant: str) -> dict[str, float | None]:
        """Of one variant, by the names that the stage table and MLflow use."""
        in_flight = self.in_flight.get(variant)
        power = self.power.variants.get(variant) if self.power else None
        return {
            **self.variants[variant].metrics(),
            **(in_flight.metrics(self.batch_size) if in_flight else {}),
            **(power.metrics() if power else {}),
            "trtexec_gpu_compute_ratio": trtexec_ratio(in_flight, self.trtexec.get(variant, {})),
        }

    def notes(self, variant: str) -> tuple[str, ...]:
        """What a reader of the variant's figures should know, and why asked-for ones are missing."""
        in_flight, failed = self.in_flight.get(variant), self.trtexec.get(variant, {}).get("failed")
        return (
            *(self.power.notes(variant) if self.power else ()),
            *(f"in flight: {warning}" for warning in (in_flight.warnings if in_flight else ())),
            *([f"no cross-check, trtexec failed: {failed}"] if failed else ()),
            *(f"no {name}: for TensorRT engines alone" for name in self.left_out.get(variant, ())),
            *(self.telemetry.notes if self.telemetry else ()),
            *self._left_behind(),
        )

    def _left_behind(self) -> list[str]:
        """What the session could not put back on the board."""
        restored = (self.power_mode or {}).get("restored", True)
        return [] if restored is True else [f"the power mode or the clocks are not as before: {restored}"]


class Evaluation(_Value):
    """An engine's score, from the outputs that it gave on the target."""

    schema_version: int = SCHEMA_VERSION
    target: str
    metrics: dict[str, float]
    samples: int
    seconds: float = Field(description="Time of the engine over all samples on the target, files included.")
    records: Report = Field(description="One record a sample, in the order of the evaluation data.")


def read_samples(path: Path, names: Sequence[str], excluded_rounds: Sequence[int]) -> dict[str, Samples]:
    """Latencies in ns and the round of each, by engine, without the excluded rounds."""
    arrays = load_file(path)
    samples = {}
    for name in names:
        latencies, rounds = arrays[f"{name}.latency_ns"], arrays[f"{name}.round"]
        counted = ~np.isin(rounds, excluded_rounds)
        samples[name] = (latencies[counted], rounds[counted])
    return samples


def measure_variants(
    samples: Mapping[str, Samples],
    names: tuple[str, ...],
    *,
    memory: Mapping[str, Mapping[str, float | None]],
    drift_ratios: Mapping[str, float],
    batch_size: int,
    seed: int,
) -> dict[str, VariantMeasurement]:
    """The measurement of each variant from a session's samples; the first is the reference of the ratios."""
    medians = {name: round_medians(*samples[name]) for name in names}
    measured = {}
    for name in names:
        latency = LatencySummary.of(*samples[name], seed=seed)
        value, interval = paired_ratio(medians[name], medians[names[0]], seed=seed)
        measured[name] = VariantMeasurement(
            variant=name,
            latency=latency,
            throughput_samples_per_s=latency.count * batch_size / latency.timed_s,
            peak_memory_mib=memory[name]["peak"],
            engine_memory_mib=memory[name]["engine"],
            device_memory_mib=memory[name].get("device"),
            drift_ratio=drift_ratios[name],
            p50_ratio=Ratio(value=value, interval=interval),
        )
    return measured
