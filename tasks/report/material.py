"""What a report is made of: a finished run as its record holds it, and what each target measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jetway.tasks.cascade_result import CascadeResult
from jetway.tasks.ladder import Rung
from jetway.tasks.measurement import BenchmarkResult
from jetway.tasks.metrics import Metric
from jetway.tasks.results import BASELINE, TargetOutcome, VariantResult
from jetway.tasks.statistics import Floats
from jetway.tasks.stream_result import StreamResult
from jetway.tasks.target_info import TargetInfo


@dataclass(frozen=True)
class Lineage:
    """The files behind one row, from the weights to what was measured, as (what it is, sha256)."""

    variant: str
    target: str
    files: tuple[tuple[str, str], ...]
    engine_version: str = ""


@dataclass(frozen=True)
class CalibrationMaterial:
    """A calibration set: how many of its samples were used, how many show each scene, and what it lacks."""

    name: str
    sha256: str
    samples: int
    scenes: Mapping[str, int]
    only_in_evaluation: Sequence[str] = ()


@dataclass(frozen=True)
class TargetMaterial:
    """What one target measured. What a recipe did not ask for, or an old run did not keep, is None or empty."""

    info: TargetInfo | None = None
    benchmark: BenchmarkResult | None = None
    latencies_ms: Mapping[str, Floats] = field(default_factory=dict)
    stream: StreamResult | None = None
    cascade: CascadeResult | None = None


@dataclass(frozen=True)
class RunMaterial:
    """A finished run. ``settings`` are the keys of its recipe that differ from the defaults."""

    run_id: str
    name: str
    recipe: str
    description: str
    started: datetime
    rows: Sequence[VariantResult]
    metrics: Sequence[Metric]
    targets: Mapping[str, TargetMaterial] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    lineage: Sequence[Lineage] = ()
    calibration: Sequence[CalibrationMaterial] = ()
    ladder: Sequence[Rung] = ()
    without_result: Sequence[TargetOutcome] = ()

    @property
    def simulated(self) -> bool:
        return any(row.simulated for row in self.rows)

    @property
    def title(self) -> str:
        return f"{self.run_id[:8]} ({self.name})"

    def target_names(self) -> list[str]:
        return list(dict.fromkeys(row.target for row in self.rows))

    def target(self, name: str) -> TargetMaterial:
        """What the target measured; nothing, where nothing of it is kept."""
        return self.targets.get(name, TargetMaterial())

    def rows_of(self, target: str) -> list[VariantResult]:
        return [row for row in self.rows if row.target == target]

    def variants(self) -> list[str]:
        """In the recipe's order; a variant keeps its colour and shape through the whole report."""
        return list(dict.fromkeys(row.variant for row in self.rows))


def baseline_of(rows: Sequence[VariantResult]) -> VariantResult | None:
    """The row of one target that its others are held against."""
    return next((row for row in rows if row.variant == BASELINE), None)
