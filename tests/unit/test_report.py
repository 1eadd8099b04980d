"""The report's parts: what it says, what it draws, and that it stays one harmless file."""

import dataclasses
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from doubles.finished_run import GATES, TOP1, VARIANTS, make_run
from doubles.html_page import HOSTILE, Page
from hypothesis import given, settings
from hypothesis import strategies as st

from jetway.tasks.layer_table import Layer
from jetway.tasks.metrics import Metric
from jetway.tasks.report.distribution import draw_distributions
from jetway.tasks.report.headline import run_headline, target_headline
from jetway.tasks.report.pareto import pareto_front
from jetway.tasks.report.points import Point, latency_points, size_points
from jetway.tasks.report.run_page import report_html
from jetway.tasks.report.scatter import draw_scatter
from jetway.tasks.report.svg import Scale, linear_ticks, log_ticks, marker, tick_texts
from jetway.tasks.report.tables import SHOWN_SCENES, calibration_table
from jetway.tasks.report.words import factor, factor_span, listed, number

LOSS = Metric(name="loss", higher_is_better=False)


@pytest.fixture(scope="module")
def run():
    return make_run()


@pytest.fixture(scope="module")
def page(run):
    return Page(report_html(run))


def rows_of(run, **metrics):
    """The run's rows with metrics of all of them changed."""
    return [row.model_copy(update={"metrics": {**row.metrics, **metrics}}) for row in run.rows]


def drawn(chart, class_):
    """Elements of a chart by their class."""
    root = ElementTree.fromstring(chart)
    return [one for one in root.iter() if class_ in one.get("class", "").split()]


def test_the_page_tells_the_whole_run(page, run):
    named = ("tiny", "loopback", *VARIANTS, "*: size_ratio <= 1", "onnxruntime 1.31.1", "street.y4m")
    titles = ("train.epochs", "How to read this", "Detector and classifier", "layer by layer")
    for told in (*named, *titles, run.environment["git_commit"]):
        assert told in page.text
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_a_calibration_set_is_told_by_scene(page, run):
    (found,) = run.calibration
    assert f"Set night: 130 samples, sha256 {found.sha256[:16]}" in page.text
    assert "in the evaluation data alone: fog" in page.text
    many = {f"scene {index}": 20 - index for index in range(SHOWN_SCENES + 3)}
    table = calibration_table(dataclasses.replace(found, scenes=many, only_in_evaluation=()))
    assert [cell.value for cell in table.rows[0]] == ["scene 0", "20"]
    assert [cell.value for cell in table.rows[-1]] == ["3 rarer scenes", "21"]


def test_the_page_asks_for_nothing_and_runs_nothing(page):
    loading = {"script", "img", "link", "iframe", "object", "embed", "video", "audio", "base", "form"}
    assert not loading & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(
            name.startswith("on") or name in ("src", "srcset", "background") for name in attributes
        ), tag
        assert (attributes.get("href") or "#").startswith("#")
    assert ":root" in page.styles[0]
    assert not re.search(r"@import|url\(|https?:", page.styles[0])


def test_hostile_names_are_words():
    made = make_run(targets=[f"board {HOSTILE}"], variants=["baseline-fp32", f"pruned {HOSTILE}"], gates=[])
    rows = [row.model_copy(update={"notes": (HOSTILE,), "board": HOSTILE}) for row in made.rows]
    layers = {HOSTILE: (Layer(name=HOSTILE, precision=HOSTILE, time_ms=1.0),)}
    targets = {
        name: dataclasses.replace(one, benchmark=one.benchmark.model_copy(update={"layers": layers}))
        for name, one in made.targets.items()
    }
    hostile = dataclasses.replace(
        made,
        name=HOSTILE,
        recipe=HOSTILE,
        description=HOSTILE,
        rows=rows,
        targets=targets,
        settings={HOSTILE: HOSTILE},
        environment={"cpu": HOSTILE, "packages": {HOSTILE: HOSTILE}},
        lineage=[dataclasses.replace(one, engine_version=HOSTILE) for one in made.lineage],
        calibration=[
            dataclasses.replace(one, name=HOSTILE, scenes={HOSTILE: 1}, only_in_evaluation=[HOSTILE])
            for one in made.calibration
        ],
    )
    html = report_html(hostile)
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert page.text.count("{{ 7 * 7 }}") > 15
    assert "49" not in {words.strip() for words in page.words}
    for chart in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(chart)


def test_a_chart_says_what_it_shows(page):
    charts = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(charts) == 5
    assert all(
        chart["aria-label"].count("pruned-int8-qat") == 1 or "front" in chart["aria-label"]
        for chart in charts
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("a", 1, 0.9), ("b", 2, 0.8), ("c", 3, 0.95)], ["a", "c"]),
        ([("a", 1, 0.9), ("b", 1, 0.9)], ["a", "b"]),
        ([("a", 1, 0.9), ("b", 1, 0.8)], ["a"]),
        ([("a", 3, 0.9), ("b", 1, 0.7), ("c", 2, 0.8)], ["b", "c", "a"]),
        ([], []),
    ],
)
def test_pareto_front(rows, expected):
    points = [Point(label, cost, score) for label, cost, score in rows]
    assert [point.label for point in pareto_front(points)] == expected
    mirrored = [Point(label, cost, -score) for label, cost, score in rows]
    assert sorted(p.label for p in pareto_front(mirrored, higher_is_better=False)) == sorted(expected)


def test_what_does_not_count_beats_nothing():
    points = [Point("slow", 2, 0.8), Point("not valid", 1, 0.9, counted=False)]
    assert [point.label for point in pareto_front(points)] == ["slow"]


def test_points_carry_the_intervals_that_are_known(run):
    rows = run.rows[:2]
    baseline, pruned = latency_points(rows, TOP1, VARIANTS)
    assert baseline.score_interval is None
    assert pruned.cost_interval == rows[1].intervals["latency_ms_p50"]
    # of a drop of 0.004 ± 0.006 against 0.985
    assert pruned.score_interval == pytest.approx((0.975, 0.987))
    assert size_points(rows, TOP1, VARIANTS)[1].cost == pytest.approx(rows[1].value("size_bytes") / 1e6)


def test_no_interval_of_a_score_goes_beyond_the_best(run):
    share = Metric(name="top1", best=0.98)
    assert latency_points(run.rows[:2], share, VARIANTS)[1].score_interval == pytest.approx((0.975, 0.98))


def test_points_of_a_metric_to_be_low(run):
    rows = [
        row.model_copy(
            update={
                "metrics": {**row.metrics, "loss": 0.4 + 0.1 * i},
                "intervals": {"loss_drop": (0.05, 0.2)},
            }
        )
        for i, row in enumerate(run.rows[:2])
    ]
    assert latency_points(rows, LOSS, VARIANTS)[1].score_interval == pytest.approx((0.45, 0.6))
    bounded = LOSS.model_copy(update={"best": 0.5})
    assert latency_points(rows, bounded, VARIANTS)[1].score_interval == pytest.approx((0.5, 0.6))


def test_intervals_are_drawn_to_scale():
    points = [Point("a", 1.0, 0.5, (0.5, 2.0), (0.4, 0.7)), Point("b", 4.0, 0.9)]
    chart = draw_scatter(points, TOP1, "ms", title="A chart")
    across, left, right, up, bottom, top = drawn(chart, "interval")
    width = float(across.get("x2")) - float(across.get("x1"))
    assert float(left.get("x1")) == float(across.get("x1"))
    assert float(right.get("x1")) == float(across.get("x2"))
    a, b = (path.get("d") for path in drawn(chart, "mark"))
    xs = [np.mean([float(x) for x in re.findall(r"[ML]([\d.]+) ", d)]) for d in (a, b)]
    assert width / (xs[1] - xs[0]) == pytest.approx(1.5 / 3.0, rel=0.02)
    assert float(bottom.get("y1")) > float(top.get("y1"))
    assert abs(float(up.get("y1")) - float(up.get("y2"))) > 0
    assert len(drawn(chart, "front")) == 1


def test_an_invalid_session_is_drawn_hollow_and_not_told_as_fast():
    run = make_run(reasons=["other processes held the CPU in 9 of 10 rounds"])
    chart = draw_scatter(latency_points(run.rows, TOP1, VARIANTS), TOP1, "ms", title="A chart")
    assert len(drawn(chart, "hollow")) == len(VARIANTS)
    assert not drawn(chart, "front")
    told = Page(report_html(run)).text
    assert "other processes held the CPU in 9 of 10 rounds" in told
    assert "speed unknown" in told
    assert "faster" not in target_headline(run.rows, run.metrics).sentence
    assert run_headline(run.rows).sentence == "No verdict on speed: the measurement on loopback is not valid"


@pytest.mark.parametrize(
    "missing", [("latency_ms_p50",), ("size_bytes", "size_ratio"), ("top1", "top1_drop")]
)
def test_what_was_not_measured_is_left_out(run, missing):
    rows = rows_of(run, **dict.fromkeys(missing))
    told = Page(report_html(dataclasses.replace(run, rows=rows, targets={}, lineage=[], environment={})))
    charts = [attributes["aria-label"] for tag, attributes in told.tags if attributes.get("role") == "img"]
    assert len(charts) == (0 if "top1" in missing else 1)
    assert "None" not in told.text
    assert "nan" not in told.text


def test_one_variant_alone():
    run = make_run(variants=["baseline-fp32"], gates=[])
    told = Page(report_html(run)).text
    assert "Measured and valid; the recipe sets no gates" in told
    assert "baseline-fp32 takes" in told
    assert "against the baseline:" not in told


def test_simulated_figures_are_marked_wherever_they_stand():
    run = make_run(simulated=True)
    html = report_html(run)
    page = Page(html)
    assert "<title>SIMULATED" in html
    charts = [attributes["aria-label"] for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert all("SIMULATED" in label for label in charts)
    assert html.count('class="watermark"') == len(charts) == 5
    assert "no gate failed" not in page.text
    assert run_headline(run.rows).sentence.startswith("Simulated: ")
    assert run_headline(run.rows).tone != "good"
    assert "SIMULATED" not in report_html(make_run())


def test_many_targets_have_a_section_each():
    run = make_run(targets=["bench-a", "bench-b"], variants=VARIANTS[:2])
    page = Page(report_html(run))
    links = [attributes["href"][1:] for tag, attributes in page.tags if tag == "a"]
    assert links == ["target-1", "target-2"]
    assert set(links) <= {attributes.get("id") for _, attributes in page.tags}


def sentence(run, **changes):
    best = run.rows[-1]
    rows = [*run.rows[:-1], best.model_copy(update=changes)]
    return target_headline(rows, run.metrics).sentence


def test_the_verdict_says_what_changed_and_what_cannot_be_told(run):
    said = sentence(run)
    assert said.startswith("pruned-int8-qat against the baseline: 10.9× faster (")
    assert "10.9× smaller (549 kB instead of 6 MB)" in said
    assert said.endswith("top1 worse by 0.0160 (0.9690 against 0.9850).")
    metrics = run.rows[-1].metrics
    unsure = {"intervals": {"latency_p50_ratio": (0.97, 1.02), "top1_drop": (-0.004, 0.02)}}
    assert "as fast, as far as this session can tell" in sentence(run, **unsure)
    assert "which this data cannot tell apart" in sentence(run, **unsure)
    better = {"metrics": {**metrics, "top1_drop": -0.01}, "intervals": {}}
    assert "top1 better by 0.0100" in sentence(run, **better)


def test_nothing_to_deploy_where_every_variant_failed():
    run = make_run(gates=["*: size_ratio <= 0.01"])
    assert target_headline(run.rows, run.metrics).sentence.startswith("Nothing to deploy here")
    assert run_headline(run.rows) == run_headline(run.rows[::-1])
    assert run_headline(run.rows).sentence == "5 gates of 5 failed: *: size_ratio <= 0.01"


def test_the_verdict_of_a_run_that_passed():
    assert (
        run_headline(make_run(gates=GATES[:1]).rows).sentence == "All 5 gates passed, on valid measurements"
    )
    both = make_run(variants=VARIANTS[:2], gates=GATES[:1])
    assert run_headline(both.rows).sentence == "Both gates passed, on valid measurements"


def test_a_gate_that_the_evidence_does_not_decide():
    run = make_run(gates=["pruned-fp32: top1_drop <= 0.004"])
    said = "No verdict: the evidence does not decide 1 gate of 1: pruned-fp32: top1_drop <= 0.004"
    assert run_headline(run.rows).sentence == said


def test_histograms_count_every_query():
    values = np.concatenate([np.full(900, 1.0), np.full(95, 2.0), np.full(5, 50.0)])
    chart = draw_distributions({"a": values}, order=["a"], title="A chart")
    assert "1,000 queries, 5 beyond the axis, slowest 50.0 ms" in chart
    assert len(drawn(chart, "percentile")) == 3
    few = draw_distributions({"a": values[:20]}, order=["a"], title="A chart")
    assert len(drawn(few, "percentile")) == 1
    assert draw_distributions({"a": values[:0]}, order=["a"], title="A chart") == ""


def test_a_histogram_is_as_high_as_its_counts():
    values = np.repeat([1.0, 1.5], [100, 50])
    chart = draw_distributions({"a": values}, order=["a"], title="A chart")
    (ridge,) = drawn(chart, "ridge")
    heights = sorted({float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", ridge.get("d"))})
    highest, middle, base = heights
    assert (base - middle) / (base - highest) == pytest.approx(0.5, rel=0.02)


positive = st.floats(1e-6, 1e9)
finite = st.floats(-1e6, 1e6)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(positive, finite, st.booleans()), min_size=1, max_size=12))
def test_any_figures_can_be_drawn(figures):
    points = [
        Point(f"v{i}", cost, score, (cost * 0.9, cost * 1.1), (score - 1, score + 1), counted)
        for i, (cost, score, counted) in enumerate(figures)
    ]
    chart = draw_scatter(points, TOP1, "ms", title="A chart")
    assert "nan" not in chart
    assert "inf" not in chart
    assert len(drawn(chart, "mark")) == len(points)


@settings(max_examples=150, deadline=None)
@given(st.lists(positive, min_size=1, max_size=300))
def test_any_latencies_can_be_drawn(values):
    chart = draw_distributions({"a": np.array(values)}, order=["a"], title="A chart")
    assert "nan" not in chart
    ElementTree.fromstring(chart)


def test_ticks_are_round_and_inside():
    assert linear_ticks(0, 0.7, 5) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert log_ticks(0.08, 12, 6) == pytest.approx([0.1, 1, 10])
    assert tick_texts([0.0, 0.02, 0.04]) == ["0.00", "0.02", "0.04"]
    assert tick_texts([0.1, 1.0, 10.0]) == ["0.1", "1", "10"]
    scale = Scale(1, 100, 0, 200, log=True)
    assert (scale(1), scale(10), scale(100)) == pytest.approx((0, 100, 200))


def test_marks_differ_by_more_than_colour():
    shapes = {re.search(r'd="([^"]*)"', marker(0, 0, index))[1] for index in range(5)}
    assert len(shapes) == 5


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (0.09404, "0.0940"), (0.642, "0.642"), (1.34, "1.34"), (66.31, "66.3"), (1461.5, "1,462"),
     (2.0e-9, "2.00e-09")],
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


def test_words():
    assert factor(0.153, "faster", "slower") == "6.5× faster"
    assert factor(1.2, "faster", "slower") == "1.20× slower"
    assert factor(1.001, "faster", "slower") == "the same"
    assert factor_span((0.147, 0.154)) == "6.5× to 6.8×"
    assert factor_span((0.356, 0.357)) == "2.8×"
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed([*"abcdef"]) == "a, b, c, d and 2 more"
