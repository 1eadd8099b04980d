"""The section of each target: its verdict, its stage table, its charts, and its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

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
MakePoints = Callable[[Sequence[VariantResult], Metric, Sequence[str]], list[Point]]
Draw = Callable[..., Markup]
Stepped = stream_result.StreamResult | cascade_result.CascadeResult


@dataclass(frozen=True)
class Figure:
    """A chart, what else a reader of it must know, and what its colours stand for where the legend does not tell."""

    title: str
    chart: Markup
    caption: str = ""
    key: Key = ()
    #: Of two runs that are held against each other, the one that it shows.
    side: str = ""


@dataclass(frozen=True)
class Side:
    """What stands beside a run: how it is called there, the variants by their marks, and the run on the other side."""

    name: str
    order: Sequence[str]
    other: RunMaterial

    @classmethod
    def alone(cls, run: RunMaterial) -> Side:
        return cls("", run.variants(), run)


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


def target_section(run: RunMaterial, target: str, anchor: str, side: Side | None = None) -> TargetSection:
    """What one target measured. Variants have the same marks in the sections of all targets."""
    figures = Figures(run, target, side or Side.alone(run))
    rows, order = figures.rows, figures.side.order
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
        figures=tuple(figure for figure in figures.all() if figure.chart),
        layers=tuple(layer_tables(figures.material)),
    )


class Figures:
    """The charts of one target; one with nothing to draw in it is empty. Axes have room for the other side's too."""

    def __init__(self, run: RunMaterial, target: str, side: Side) -> None:
        self.side, self.metric = side, run.metrics[0]
        self.rows, self.material = run.rows_of(target), run.target(target)
        self.other_rows, self.other = side.other.rows_of(target), side.other.target(target)
        self.simulated = any(row.simulated for row in self.rows)
        self.valid = all(row.validity.valid for row in self.rows)

    def all(self) -> list[Figure]:
        found = [self.accuracy_latency(), self.accuracy_size(), self.latencies()]
        stream, cascade = self.material.stream, self.material.cascade
        if stream:
            width, height = stream.frame_size
            title = f"A frame by step, of {stream.source}, {width} × {height}"
            found.append(self.steps(title, stream, self.other.stream, stream_result.STEPS))
        if cascade:
            title = "Detector and classifier as one, by step"
            found.append(self.steps(title, cascade, self.other.cascade, cascade_result.STEPS))
        return found

    def accuracy_latency(self) -> Figure:
        points, others = self.points(latency_points)
        caption = (
            f"{self.front_text(points)} Bars are 95 % intervals: of the latency, and of {self.metric.name} as paired "
            "with the baseline's on the same samples, so the baseline has none. Where bars overlap, the order is "
            "not decided."
        )
        title = f"{self.metric.name} against latency"
        return self.scatter(title, points, others, "ms, median", caption)

    def accuracy_size(self) -> Figure:
        points, others = self.points(size_points)
        caption = f"{self.front_text(points)} A size is exact."
        return self.scatter(f"{self.metric.name} against size", points, others, "MB", caption)

    def points(self, of: MakePoints) -> tuple[list[Point], list[Point]]:
        """This side's and the other's."""
        one, other = (of(rows, self.metric, self.side.order) for rows in (self.rows, self.other_rows))
        return one, other

    def scatter(
        self, title: str, points: Sequence[Point], others: Sequence[Point], cost: str, caption: str
    ) -> Figure:
        draw = partial(draw_scatter, points, self.metric, cost, beside=others)
        return self.figure(title, draw, caption)

    def front_text(self, points: Sequence[Point]) -> str:
        front = pareto_front(points, higher_is_better=self.metric.higher_is_better)
        hollow = (
            "" if all(point.counted for point in points) else " Hollow marks are not valid and do not count."
        )
        names = listed([point.label for point in front], len(front))
        return f"Pareto front (dashed): {names}.{hollow}" if front else f"No Pareto front.{hollow}"

    def latencies(self) -> Figure:
        beside = self.other.latencies_ms.values()
        draw = partial(draw_distributions, self.material.latencies_ms, order=self.side.order, beside=beside)
        invalid = "" if self.valid else " The session is not valid."
        caption = f"Every counted query is in its histogram. Ticks: p50, p90 and p99.{invalid}"
        return self.figure("How long queries took", draw, caption)

    def steps(
        self,
        title: str,
        result: Stepped,
        other: Stepped | None,
        steps: Sequence[str],
    ) -> Figure:
        times = {name: found.steps for name, found in result.variants.items()}
        beside = [found.steps for found in other.variants.values()] if other else []
        draw = partial(draw_steps, times, steps, END_TO_END, beside=beside)
        invalid = "" if result.validity.valid else f"INVALID: {'; '.join(result.validity.reasons)}. "
        caption = "Medians of the steps; the tick is the median end to end, which they need not sum up to."
        key = tuple((box(i), step) for i, step in enumerate(steps))
        return self.figure(title, draw, f"{invalid}{caption}", key)

    def figure(self, title: str, draw: Draw, caption: str, key: Key = ()) -> Figure:
        title = f"{title} (SIMULATED)" if self.simulated else title
        told = ", ".join(filter(None, (title, self.side.name)))
        return Figure(title, draw(title=told, simulated=self.simulated), caption, key, self.side.name)


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
