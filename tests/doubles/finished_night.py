"""A night with made-up figures, and the runs of the nights before it as MLflow gives them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

from jetway.tasks.comparison import ComparedMetric, ComparedRow
from jetway.tasks.history import Series, read_series
from jetway.tasks.metrics import Metric
from jetway.tasks.nightly import NightResult, NightRow, night_figures
from jetway.tasks.report.nightly_page import NightMaterial
from jetway.tasks.results import VariantResult
from jetway.tasks.tracking.registry import Champion
from jetway.tasks.tracking.values import RunRecord
from jetway.tasks.verdict import Change, Evidence

DAY_MS = 86_400_000
LAST_NIGHT = datetime(2026, 11, 21, 2, 30, tzinfo=UTC)
BOARD = "Orin NX of the tests"
VARIANT = "pruned-int8-qat"


def make_candidate(*, variant: str = VARIANT, simulated: bool = False) -> VariantResult:
    return VariantResult(
        variant=variant, target="bench", precision="int8", engine="tensorrt", board=BOARD, simulated=simulated,
        metrics={"latency_ms_p50": 1.05, "size_bytes": 1e6, "params": 1e5, "macs": 1e7, "top1": 0.985},
        intervals={"latency_ms_p50": (1.04, 1.06)},
    )  # fmt: skip


def make_compared(*, variant: str = VARIANT, simulated: bool = False) -> ComparedRow:
    """Slower for certain, and a score that the data cannot tell."""
    runs = Evidence(
        effect=0.05,
        interval=(0.045, 0.056),
        p_value=0.001,
        count=10,
        unit="runs",
        margin=0.03,
        rule="equivalence",
    )
    samples = Evidence(
        effect=0.004, interval=(-0.005, 0.013), p_value=0.2, count=500, unit="samples", margin=0.01,
        rule="non-inferiority", samples_needed=4711,
    )  # fmt: skip
    metrics = (
        ComparedMetric(metric="size_bytes", before=1e6, after=1e6, change=Change.SAME),
        ComparedMetric(
            metric="top1", before=0.989, after=0.985, change=Change.UNKNOWN, evidence=samples,
            reason="500 samples leave -0.50 % to +1.30 % open; 4,711 are recommended",
        ),
        ComparedMetric(metric="latency_ms_p50", before=1.0, after=1.05, change=Change.REGRESSED, evidence=runs),
    )  # fmt: skip
    return ComparedRow(variant=variant, target="bench", simulated=simulated, metrics=metrics)


def make_row(*, variant: str = VARIANT, simulated: bool = False) -> NightRow:
    return NightRow(
        recipe="digits", target="bench", target_class="orin-nx", run_id="4f1c" * 8,
        candidate=make_candidate(variant=variant, simulated=simulated), task_metrics=(Metric(name="top1"),),
        champion=Champion(model="digits.orin-nx", version=3, run_id="c" * 32, variant=variant, target="bench"),
        compared=make_compared(variant=variant, simulated=simulated),
        notes=("the champion's engine was built anew from its ONNX file: engine_version was 10.3 and is 10.7",),
    )  # fmt: skip


def make_night(*, nights: int = 40, variant: str = VARIANT, simulated: bool = False) -> NightMaterial:
    """One recipe that regressed and one that failed, after so many nights."""
    row = make_row(variant=variant, simulated=simulated)
    failed = NightRow(
        recipe="detector", target="nano", target_class="nano", error="nano did not answer", error_exit_code=3
    )
    series = read_series(make_comparisons(row, nights), ["latency_ms_p50", "top1", "size_bytes"])
    history: dict[str, Sequence[Series]] = {row.name: series}
    return NightMaterial(LAST_NIGHT, NightResult(run_id="9a8b" * 8, rows=(row, failed)), history)


def make_comparisons(
    row: NightRow, nights: int, *, moved_at: int | None = None, shift: float = 0.05
) -> list[RunRecord]:
    """Runs of that many nights, newest first; the latency moves by ``shift``, at the last quarter unless said."""
    rng, figures = np.random.default_rng(0), night_figures(row)
    moved_at = nights * 3 // 4 if moved_at is None else moved_at
    found = []
    for night in range(nights):
        level = (1 + 0.01 * rng.standard_normal()) * (1 if night < moved_at else 1 + shift) / (1 + shift)
        own = {name: value * level if "latency" in name else value for name, value in figures.items()}
        verdict = "REGRESSED" if night == moved_at else "SAME"
        found.append(make_comparison(night - nights + 1, own, verdict, row))
    return found[::-1]


def make_comparison(day: int, figures: dict[str, float], verdict: str, row: NightRow) -> RunRecord:
    assert row.candidate is not None
    return RunRecord(
        run_id=f"{day:032x}", name=row.name, experiment="jetway-nightly", status="FINISHED",
        started_ms=int(LAST_NIGHT.timestamp() * 1000) + day * DAY_MS, params={}, metrics=figures,
        tags={"board": row.candidate.board, "verdict": verdict, "variant": row.candidate.variant},
    )  # fmt: skip
