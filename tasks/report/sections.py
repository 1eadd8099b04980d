"""The section of each target: its verdict, its stage table, its charts, and its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from jetway.tasks import cascade_result, stream_result
from jetway.tasks.layer_table import Layer
from jetway.tasks.metrics import Metric
from jetway.tasks.report.distribution import draw_distributions
from jetway.tasks.report.headline import Headline, target_headline
from jetway.tasks.report.material import RunMaterial, TargetMaterial
from jetway.tasks.report.pareto import pareto_front
from jetway.tasks.report.points import Point, latency_points, size_points
from jetway.tasks.report.scatter import draw_scatter
from jetway.tasks.report.steps import draw_steps
from jetway.tasks.report.svg import box, swatch
from jetway.tasks.report.tables import Table, stage_table
from jetway.tasks.report.words import listed
from jetway.tasks.results import VariantResult
from jetway.tasks.stream_result import END_TO_END

#: Layers of an engine that are shown, slowest first; the rest is summed up.
SHOWN_LAYERS = 15

Key = tuple[tuple[Markup, str], ...]


@dataclass(frozen=True)
class Figure:
    """A chart, what else a reader of it must know, and what its colours stand for where the legend does not tell."""

    title: str
    chart: Markup
    caption: str = ""
    key: Key = ()


@dataclass(frozen=True)
class Layers:
    """The slowest layers of one engine, each with its share of the time, and what the others sum up to."""

    variant: str
    slowest: tuple[tuple[Layer, float], ...]
    others: int
    others_ms: float


@dataclass(frozen=True)
class TargetSection:
    """All that is told of one target."""

    name: str
    anchor: str
    board: str
    simulated: bool
    headline: Headline
    reasons: tuple[str, ...]
    table: Table
    key: Key
    figures: tuple[Figure, ...]
    layers: tuple[Layers, ...]


def target_section(run: RunMaterial, target: str, anchor: str) -> TargetSection:
    """What one target measured. Variants have the same marks in the sections of all targets."""
    rows, order = run.rows_of(target), run.variants()
    figures = Figures(rows, run.metrics[0], order)
    material = run.target(target)
    return TargetSection(
        name=target,
        anchor=anchor,
        board=rows[0].board,
        simulated=figures.simulated,
        headline=target_headline(rows, run.metrics),
        reasons=tuple(dict.fromkeys(reason for row in rows for reason in row.validity.reasons)),
        table=stage_table(rows, run.metrics),
        key=tuple(
            (swatch(order.index(row.variant), hollow=not row.validity.valid), row.variant) for row in rows
        ),
        figures=tuple(figure for figure in figures.of(material) if figure.chart),
        layers=tuple(layer_tables(material)),
    )


class Figures:
    """The charts of one target's rows; one with nothing to draw in it is empty."""

    def __init__(self, rows: Sequence[VariantResult], metric: Metric, order: Sequence[str]) -> None:
        self.rows, self.metric, self.order = rows, metric, order
        self.simulated = any(row.simulated for row in rows)
        self.valid = all(row.validity.valid for row in rows)

    def of(self, material: TargetMaterial) -> list[Figure]:
        found = [self.accuracy_latency(), self.accuracy_size(), self.latencies(material)]
        if material.stream:
            width, height = material.stream.frame_size
            title = f"A frame by step, of {material.stream.source}, {width} × {height}"
            found.append(self.steps(title, material.stream, stream_result.STEPS))
        if material.cascade:
            title = "Detector and classifier as one, by step"
            found.append(self.steps(title, material.cascade, cascade_result.STEPS))
        return found

    def accuracy_latency(self) -> Figure:
        title = self.titled(f"{self.metric.name} against latency")
        points = latency_points(self.rows, self.metric, self.order)
        caption = (
            f"{self.front_text(points)} Bars are 95 % intervals: of the latency, and of {self.metric.name} as paired "
            "with the baseline's on the same samples, so the baseline has none. Where bars overlap, the order is "
            "not decided."
        )
        return Figure(title, self.scatter(points, "ms, median", title), caption)

    def accuracy_size(self) -> Figure:
        title = self.titled(f"{self.metric.name} against size")
        points = size_points(self.rows, self.metric, self.order)
        return Figure(title, self.scatter(points, "MB", title), f"{self.front_text(points)} A size is exact.")

    def scatter(self, points: Sequence[Point], cost: str, title: str) -> Markup:
        return draw_scatter(points, self.metric, cost, title=title, simulated=self.simulated)

    def front_text(self, points: Sequence[Point]) -> str:
        front = pareto_front(points, higher_is_better=self.metric.higher_is_better)
        hollow = (
            "" if all(point.counted for point in points) else " Hollow marks are not valid and do not count."
        )
        names = listed([point.label for point in front], len(front))
        return f"Pareto front (dashed): {names}.{hollow}" if front else f"No Pareto front.{hollow}"

    def latencies(self, material: TargetMaterial) -> Figure:
        title = self.titled("How long queries took")
        chart = draw_distributions(
            material.latencies_ms, order=self.order, title=title, simulated=self.simulated
        )
        invalid = "" if self.valid else " The session is not valid."
        return Figure(
            title, chart, f"Every counted query is in its histogram. Ticks: p50, p90 and p99.{invalid}"
        )

    def steps(
        self,
        title: str,
        result: stream_result.StreamResult | cascade_result.CascadeResult,
        steps: Sequence[str],
    ) -> Figure:
        title = self.titled(title)
        times = {name: found.steps for name, found in result.variants.items()}
        chart = draw_steps(times, steps, END_TO_END, title=title, simulated=self.simulated)
        invalid = "" if result.validity.valid else f"INVALID: {'; '.join(result.validity.reasons)}. "
        caption = "Medians of the steps; the tick is the median end to end, which they need not sum up to."
        return Figure(
            title, chart, f"{invalid}{caption}", tuple((box(i), step) for i, step in enumerate(steps))
        )

    def titled(self, title: str) -> str:
        return f"{title} (SIMULATED)" if self.simulated else title


def layer_tables(material: TargetMaterial) -> list[Layers]:
    """The slowest layers of every engine whose layers were timed."""
    engines = material.benchmark.layers if material.benchmark else {}
    return [found for name, layers in engines.items() if (found := _slowest(name, layers))]


def _slowest(variant: str, layers: Sequence[Layer]) -> Layers | None:
    timed = [(layer, layer.time_ms) for layer in layers if layer.time_ms is not None]
    timed.sort(key=lambda one: one[1], reverse=True)
    total = sum(time_ms for _, time_ms in timed)
    if not total:
        return None
    shown, others = timed[:SHOWN_LAYERS], timed[SHOWN_LAYERS:]
    shares = tuple((layer, time_ms / total) for layer, time_ms in shown)
    return Layers(variant, shares, len(others), sum(time_ms for _, time_ms in others))
