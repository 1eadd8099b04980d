"""The page of a comparison: what it says first, what it draws, and what it keeps to itself."""

import re
from xml.etree import ElementTree

import pytest
from doubles.html_page import HOSTILE, Page

from jetway.tasks.comparison import ComparedMetric, ComparedRow
from jetway.tasks.report.comparison_page import ComparisonMaterial, comparison_headline, comparison_html
from jetway.tasks.report.effects import Effect, draw_effects
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


def comparison(*rows, params=(), unmatched=()):
    return ComparisonMaterial("1a2b (tiny monday)", "3c4d (tiny tuesday)", rows, dict(params), unmatched)


WORSE = score(Change.REGRESSED, 0.03, (0.02, 0.04))
EQUAL = score(Change.SAME, 0.001, (-0.004, 0.006))
UNTOLD = figure("latency_ms_p50", Change.UNKNOWN, reason="not measured in turns")
SMALLER = figure("size_bytes", Change.IMPROVED)


@pytest.mark.parametrize(
    ("rows", "tone", "sentence"),
    [
        ([row(UNTOLD, WORSE, SMALLER)], "bad", "Worse: top1 of pruned-int8-qat on bench"),
        ([row(UNTOLD, SMALLER)], "unsure", "Nothing is known to be worse; 1 figure of 2 cannot be judged"),
        ([row(SMALLER, EQUAL)], "good", "Nothing is worse; better: size_bytes of pruned-int8-qat on bench"),
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
    for words in ("1a2b (tiny monday)", "not measured in turns", "qat.epochs", *unmatched):
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


def test_hostile_names_are_words():
    figures = [figure(HOSTILE, Change.UNKNOWN, reason=HOSTILE), WORSE]
    rows = [row(*figures, variant=HOSTILE)]
    html = comparison_html(
        ComparisonMaterial(HOSTILE, HOSTILE, rows, {HOSTILE: (HOSTILE, HOSTILE)}, [HOSTILE])
    )
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count("{{ 7 * 7 }}") > 8
    for chart in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(chart)


def test_simulated_rows_are_marked():
    page = Page(comparison_html(comparison(row(WORSE, simulated=True))))
    assert page.text.startswith("SIMULATED: ")
    charts = [attributes["aria-label"] for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert len(charts) == 1
    assert "SIMULATED" in charts[0]
