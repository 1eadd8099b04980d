"""Compare: what each variant is against the baseline, which gates hold, and the picture of it."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from jetway.configs.schema import Gate
from jetway.tasks.artifacts import Figure, StageOutput
from jetway.tasks.chart import add_chart, new_canvas
from jetway.tasks.errors import ConfigError
from jetway.tasks.gates import evaluate_gates
from jetway.tasks.metrics import Metric
from jetway.tasks.results import BASELINE, RATIO_METRICS, VariantResult, drop_name, dump_rows
from jetway.tasks.stage import StageContext
from jetway.tasks.store import Store


def compare_variants(
    context: StageContext, rows: Sequence[VariantResult], gates: Sequence[Gate]
) -> StageOutput:
    """The finished rows as a report (``results.load_rows`` reads it) and an accuracy-latency chart a target.

    Never reused: measurements are not cached, and neither is a verdict on them. Raises ConfigError when a
    target has no baseline row, or a gate names a metric that no row has.
    """
    metrics = context.workload.metrics
    judged = evaluate_gates(derive_metrics(rows, metrics), gates)
    table = context.store.add_json(dump_rows(judged, metrics))
    charts = {
        f"accuracy_latency_{target}.png": draw_accuracy_latency(context.store, group, metrics[0])
        for target, group in by_target(judged).items()
    }
    return StageOutput(handle=table, files=dict(charts))


def derive_metrics(rows: Sequence[VariantResult], metrics: Sequence[Metric]) -> list[VariantResult]:
    """The rows with ratios and drops against the baseline of the same target.

    What a row already carries stays: a session's own latency ratio, with its interval, is better than the
    quotient of two medians. Raises ConfigError when a target has no baseline row.
    """
    baselines = {row.target: row for row in rows if row.variant == BASELINE}
    missing = sorted({row.target for row in rows} - set(baselines))
    if missing:
        raise ConfigError(f"{', '.join(missing)}: no {BASELINE} row, which every ratio and drop refers to.")
    return [_derive(row, baselines[row.target], metrics) for row in rows]


def by_target(rows: Sequence[VariantResult]) -> dict[str, list[VariantResult]]:
    """Rows of each target, in their order."""
    targets = dict.fromkeys(row.target for row in rows)
    return {target: [row for row in rows if row.target == target] for target in targets}


def draw_accuracy_latency(store: Store, rows: Sequence[VariantResult], metric: Metric) -> Figure:
    """Scatter of one target's variants: median latency in ms against the metric, the machine in the title.

    A hollow marker is a measurement that is not valid.
    """
    figure = new_canvas(7, 4.5)
    axes = figure.subplots()
    for row in rows:
        latency, score = row.value("latency_ms_p50"), row.value(metric.name)
        if latency is None or score is None:
            continue
        style = "full" if row.validity.valid else "none"
        axes.plot(latency, score, "o", markersize=9, fillstyle=style)
        axes.annotate(row.variant, (latency, score), (6, 6), textcoords="offset points", fontsize=8)
    axes.set_xlabel("latency p50, ms (lower is better)")
    axes.set_ylabel(f"{metric.name} ({'higher' if metric.higher_is_better else 'lower'} is better)")
    axes.set_xlim(left=0)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.set_title(f"{rows[0].target}: {rows[0].engine}\n{rows[0].board}", fontsize=10)
    return add_chart(store, figure)


@task(name="compare", cache_policy=NO_CACHE, persist_result=False)
def compare(context: StageContext, rows: Sequence[VariantResult], gates: Sequence[Gate]) -> StageOutput:
    with context.timed("compare"):
        return compare_variants(context, rows, gates)


def _derive(row: VariantResult, baseline: VariantResult, metrics: Sequence[Metric]) -> VariantResult:
    derived: dict[str, float | None] = {
        name: _ratio(row.value(of), baseline.value(of)) for name, of in RATIO_METRICS.items()
    }
    derived |= {
        drop_name(metric): _drop(row.value(metric.name), baseline.value(metric.name), metric)
        for metric in metrics
    }
    return row.model_copy(update={"metrics": derived | row.measured()})


def _ratio(value: float | None, baseline: float | None) -> float | None:
    return None if value is None or not baseline else value / baseline


def _drop(value: float | None, baseline: float | None, metric: Metric) -> float | None:
    if value is None or baseline is None:
        return None
    return baseline - value if metric.higher_is_better else value - baseline
