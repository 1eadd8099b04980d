"""The page of a comparison: what it says first, what it draws, and what it keeps to itself."""

import dataclasses
import re
from xml.etree import ElementTree

import pytest
from doubles.finished_run import DIGEST, VARIANTS, make_run
from doubles.html_page import HOSTILE, Page

from jetway.tasks.comparison import ComparedMetric, ComparedRow
from jetway.tasks.report.beside import DIFFERS, beside
from jetway.tasks.report.comparison_page import ComparisonMaterial, comparison_headline, comparison_html
from jetway.tasks.report.effects import Effect, draw_effects
from jetway.tasks.report.tables import Cell, Table
from jetway.tasks.verdict import Change, Evidence


def figure(metric, change, *, reason="", evidence=None):
    return ComparedMetric(
        metric=metric, before=1.0, after=2.0, change=change, reason=reason, evidence=evidence
    )


def score(change, effect, interval):
    told = {"p_value": 0.01, "count": 5000, "unit": "samples", "margin": 0.01, "rule": "non-inferiority"}
    return figure("top1", change, evidence=Evidence(effect=effect, interval=interval, **told))


def row(*metrics, variant="pruned-int8-qat", simulated=False):
    return ComparedRow(variant=variant, target="bench", simulated=simulated, metrics=metrics)


def comparison(*rows, params=(), unmatched=(), second=None):
    runs = make_run(["bench"]), second or make_run(["bench"], name="tiny tuesday")
    return ComparisonMaterial(runs, rows, dict(params), unmatched)


WORSE = score(Change.REGRESSED, 0.03, (0.02, 0.04))
EQUAL = score(Change.SAME, 0.001, (-0.004, 0.006))
UNTOLD = figure("latency_ms_p50", Change.UNKNOWN, reason="not measured in turns")
GROWN = figure("macs", Change.REGRESSED)
SMALLER = figure("size_bytes", Change.IMPROVED)


@pytest.mark.parametrize(
    ("rows", "tone", "sentence"),
    [
        ([row(UNTOLD, WORSE, SMALLER)], "bad", "Worse: top1 of pruned-int8-qat on bench"),
        (
            [row(UNTOLD, SMALLER)],
            "unsure",
            "Nothing is known to be worse; no verdict on median latency of pruned-int8-qat on bench",
        ),
        ([row(SMALLER, EQUAL)], "good", "Nothing is worse; better: size of pruned-int8-qat on bench"),
        (
            [row(GROWN, WORSE, variant=variant) for variant in "abc"] + [row(WORSE, variant="d")],
            "bad",
            "Worse: MACs and top1 of 3 variants on bench; top1 of d on bench",
        ),
        ([row(EQUAL), row(EQUAL, variant="pruned-fp32")], "good", "Nothing changed beyond the margins"),
    ],
)
def test_headline(rows, tone, sentence):
    headline = comparison_headline(comparison(*rows))
    assert (headline.tone, headline.sentence) == (tone, sentence)
    assert sum(int(tile.figure) for tile in headline.tiles) == sum(len(one.metrics) for one in rows)


def test_the_page_has_the_worst_first_and_only_the_params_that_differ():
    params, unmatched = {"qat.epochs": ("3", None)}, ["only the first run has x on bench"]
    page = Page(comparison_html(comparison(row(SMALLER, UNTOLD, WORSE), params=params, unmatched=unmatched)))
    at = [page.text.index(verdict) for verdict in ("✗ REGRESSED", "? UNKNOWN", "✓ IMPROVED")]
    assert at == sorted(at)
    for words in ("4f1c4f1c (tiny tuesday)", "not measured in turns", "qat.epochs", *unmatched):
        assert words in page.text
    assert "Both runs have the same params" in Page(comparison_html(comparison(row(EQUAL)))).text


def test_effects_are_drawn_to_scale_beside_the_margin():
    effects = [Effect("a", "REGRESSED", 0.03, (0.02, 0.04)), Effect("b", "UNKNOWN", 0.0, None)]
    root = ElementTree.fromstring(draw_effects(effects, 0.01, "drop", title="A chart"))
    band = next(one for one in root.iter("rect"))
    across = next(one for one in root.iter("line") if one.get("class") == "percentile")
    width = float(across.get("x2")) - float(across.get("x1"))
    assert width == pytest.approx(float(band.get("width")), rel=0.01), "both are 0.02 wide"
    assert float(across.get("x1")) > float(band.get("x")) + float(band.get("width"))
    assert draw_effects([], 0.01, "drop", title="A chart") == ""


def test_effects_on_latency_are_told_in_percent():
    told = {"p_value": 0.01, "count": 14, "unit": "runs", "margin": 0.03, "rule": "equivalence"}
    slower = Evidence(effect=0.042, interval=(0.035, 0.05), **told)
    page = Page(comparison_html(comparison(row(figure("latency_ms_p50", Change.REGRESSED, evidence=slower)))))
    assert "How much worse median latency is" in page.text
    assert "+4.2% [+3.5%, +5.0%]" in page.text
    assert "The band is the margin of 3 %." in page.text
    assert "in turns:" not in page.text, "it was measured so"


def test_hostile_names_are_words():
    figures = [figure(HOSTILE, Change.UNKNOWN, reason=HOSTILE), WORSE]
    rows = [row(*figures, variant=HOSTILE)]
    run = make_run(["bench"], ["baseline-fp32", HOSTILE], name=HOSTILE, reasons=[HOSTILE])
    runs = run, dataclasses.replace(run, environment={"cpu": HOSTILE, "packages": {HOSTILE: HOSTILE}})
    html = comparison_html(ComparisonMaterial(runs, rows, {HOSTILE: (HOSTILE, HOSTILE)}, [HOSTILE]))
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count("{{ 7 * 7 }}") > 8
    for chart in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(chart)


def test_simulated_rows_are_marked():
    simulated = make_run(["bench"], simulated=True)
    page = Page(comparison_html(comparison(row(WORSE, simulated=True), second=simulated)))
    assert page.text.startswith("SIMULATED: ")
    assert "SIMULATED" in charts_of(page)[0]
    assert all("SIMULATED" in label for label in charts_of(page) if "second run" in label)
    assert not any("SIMULATED" in label for label in charts_of(page) if "first run" in label)


def charts_of(page):
    return [attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") == "img"]


@pytest.fixture(scope="module")
def two_runs():
    """The page of two runs of which the second was disturbed, lost its stream, and has another commit and engine."""
    made = make_run(["bench"], VARIANTS[:2], gates=["*: size_ratio <= 0.9"], reasons=["the board throttled"])
    bench = dataclasses.replace(made.targets["bench"], stream=None)
    second = dataclasses.replace(
        made,
        targets={"bench": bench},
        environment=made.environment | {"git_commit": "another commit"},
        lineage=[dataclasses.replace(made.lineage[0], files=(("weights", DIGEST), ("engine", "f" * 64)))],
    )
    rows = [row(EQUAL, UNTOLD, variant=variant) for variant in VARIANTS[:2]]
    return Page(comparison_html(comparison(*rows, second=second)))


def test_the_page_has_what_both_runs_measured(two_runs):
    labels = charts_of(two_runs)
    for kind in ("top1 against latency", "top1 against size", "How long queries took", "Detector and"):
        sides = [label for label in labels if label.startswith(kind)]
        assert ["first run" in sides[0], "second run" in sides[1], len(sides)] == [True, True, 2]
    assert sum(label.startswith("A frame by step") for label in labels) == 1
    for told in ("What each variant is and does on bench", "layer by layer, first run"):
        assert told in two_runs.text


def test_the_page_tells_gates_validity_and_origin_of_both_sides(two_runs):
    for told in (
        "INVALID measurement, second run.",
        "the board throttled",
        "bench first run ✓ yes",
        "bench second run ✗ NO",
        "*: size_ratio <= 0.9 second run ✗ FAIL baseline-fp32 bench",
    ):
        assert told in two_runs.text
    assert "commit of the project" in two_runs.text
    assert "another commit" in two_runs.text
    assert f"baseline-fp32 second run bench onnxruntime 1.31.1 {DIGEST[:16]} {DIFFERS} ffffffffffffffff" in (
        two_runs.text
    )
    assert "pruned-fp32 first run bench onnxruntime 1.31.1" in two_runs.text


def test_sides_share_their_axes():
    small, large = make_run(["bench"], VARIANTS[:1]), make_run(["bench"], VARIANTS)
    page = comparison_html(ComparisonMaterial((small, large), [row(EQUAL, variant=VARIANTS[0])], {}))
    for kind in ("top1 against latency", "top1 against size", "How long queries took"):
        charts = re.findall(rf'<svg[^>]*aria-label="{kind}.*?</svg>', page, re.DOTALL)
        first, second = (
            set(re.findall(r'<text x="([^"]*)"[^>]*text-anchor="middle">([^<]*)', one)) for one in charts
        )
        assert first
        assert first == second


def table(*rows, titles=("what", "figure")):
    return Table("a table", tuple(map(Cell, titles)), tuple(tuple(map(Cell, cells)) for cells in rows))


def test_tables_of_both_runs_become_one():
    both = beside(
        (table(("a", "1"), ("b", "2")), table(("c", "3"), ("a", "4"))), ["what"], "both", marked=True
    )
    assert [cell.value for cell in both.titles] == ["what", "run", "figure"]
    assert [[cell.value for cell in cells] for cells in both.rows] == [
        ["c", "second run", "3"],
        ["a", "first run", "≠ 1"],
        ["a", "second run", "≠ 4"],
        ["b", "first run", "2"],
    ]
    assert beside((None, None), ["what"], "nothing") is None
    alone = beside((None, table(("a", "1"))), ["what"], "one")
    assert [[cell.value for cell in cells] for cells in alone.rows] == [["a", "second run", "1"]]
