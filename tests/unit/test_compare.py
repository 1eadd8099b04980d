"""Ratios and drops against the baseline, and the chart."""

import json
from pathlib import Path

import pytest

from jetway.configs.schema import Gate
from jetway.tasks.compare import by_target, compare_variants, derive_metrics, draw_accuracy_latency
from jetway.tasks.errors import ConfigError
from jetway.tasks.metrics import Metric
from jetway.tasks.results import Validity, VariantResult, Verdict, load_rows
from jetway.tasks.store import Store

TOP1 = Metric(name="top1")
LOSS = Metric(name="loss", higher_is_better=False)


class Workload:
    metrics = (TOP1, LOSS)


class Context:
    """What compare reads of a StageContext."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.workload = Workload()


def make_row(variant: str, target: str = "loopback", **metrics: float | None) -> VariantResult:
    return VariantResult(
        variant=variant, target=target, precision="fp32", engine="ort", board="a $1 board", metrics=metrics
    )


def test_derive_metrics_refers_to_the_baseline_of_the_same_target() -> None:
    rows = [
        make_row("baseline-fp32", "a", size_bytes=100, latency_ms_p50=10, top1=0.98, loss=0.10),
        make_row("pruned-fp32", "a", size_bytes=40, latency_ms_p50=5, top1=0.97, loss=0.13),
        make_row("baseline-fp32", "b", size_bytes=200, latency_ms_p50=10, top1=0.98, loss=0.10),
        make_row("pruned-fp32", "b", size_bytes=40, latency_ms_p50=4, top1=0.99, loss=0.09),
    ]
    derived = derive_metrics(rows, [TOP1, LOSS])
    assert [row.value("size_ratio") for row in derived] == [1.0, 0.4, 1.0, 0.2]
    assert [row.value("latency_p50_ratio") for row in derived] == [1.0, 0.5, 1.0, 0.4]
    assert [row.value("top1_drop") for row in derived] == pytest.approx([0, 0.01, 0, -0.01])
    assert [row.value("loss_drop") for row in derived] == pytest.approx([0, 0.03, 0, -0.01])


def test_derive_metrics_keeps_a_sessions_own_ratio() -> None:
    rows = [
        make_row("baseline-fp32", latency_ms_p50=10),
        make_row("pruned-fp32", latency_ms_p50=5, latency_p50_ratio=0.47),
    ]
    assert derive_metrics(rows, [TOP1])[1].value("latency_p50_ratio") == 0.47


def test_derive_metrics_invents_nothing() -> None:
    rows = [
        make_row("baseline-fp32", size_bytes=0, top1=0.9),
        make_row("pruned-fp32", size_bytes=4, top1=None),
    ]
    derived = derive_metrics(rows, [TOP1])[1]
    assert [derived.value(name) for name in ("size_ratio", "macs_ratio", "top1_drop")] == [None, None, None]


def test_derive_metrics_refuses_a_target_without_baseline() -> None:
    with pytest.raises(ConfigError, match="orin: no baseline-fp32 row"):
        derive_metrics([make_row("baseline-fp32", "a"), make_row("pruned-fp32", "orin")], [TOP1])


def test_compare_variants_reports_rows_gates_and_a_chart_a_target(tmp_path: Path) -> None:
    context = Context(Store(tmp_path))
    rows = [
        make_row(variant, target, latency_ms_p50=ms, top1=0.9, loss=0.1)
        for target in ("a", "b")
        for variant, ms in (("baseline-fp32", 10.0), ("pruned-fp32", 5.0))
    ]
    gates = [Gate.model_validate("pruned-*: latency_p50_ratio <= 0.4")]
    output = compare_variants(context, rows, gates)  # type: ignore[arg-type]
    judged, metrics = load_rows(json.loads(context.store.open(output.handle).read_text()))
    assert [gate.verdict for row in judged for gate in row.gates] == [Verdict.FAIL, Verdict.FAIL]
    assert tuple(metrics) == (TOP1, LOSS)
    assert set(output.files) == {"accuracy_latency_a.png", "accuracy_latency_b.png"}
    for figure in output.files.values():
        assert context.store.open(figure).read_bytes().startswith(b"\x89PNG")


def test_draw_accuracy_latency_shows_invalid_and_skips_unmeasured(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = [make_row("baseline-fp32", latency_ms_p50=10, top1=0.9), make_row("pruned-fp32", top1=0.9)]
    drawn = draw_accuracy_latency(store, rows, TOP1)
    alone = draw_accuracy_latency(store, rows[:1], TOP1)
    invalid = rows[0].model_copy(update={"validity": Validity(valid=False, reasons=("drift",))})
    assert drawn == alone
    assert draw_accuracy_latency(store, [invalid], TOP1) != alone


def test_by_target_keeps_the_order_of_targets_and_rows() -> None:
    rows = [make_row("x", "b"), make_row("y", "a"), make_row("z", "b")]
    assert [(t, [r.variant for r in group]) for t, group in by_target(rows).items()] == [
        ("b", ["x", "z"]),
        ("a", ["y"]),
    ]
