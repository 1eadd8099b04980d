"""The page of a night and its series: what they say first, what they draw, and what they keep to themselves."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from doubles.finished_night import make_comparisons, make_night, make_row
from doubles.html_page import HOSTILE, Page

from jetway.tasks.history import read_series
from jetway.tasks.nightly import NightResult
from jetway.tasks.report.nightly_page import night_html, night_sentence
from jetway.tasks.report.series import draw_series, moves_text


def latencies(nights, **planted):
    (series,) = read_series(make_comparisons(make_row(), nights, **planted), ["latency_ms_p50"])
    return series


def test_series_is_oldest_first_and_moved_where_it_was_planted():
    series = latencies(40, moved_at=25)
    assert len(series.points) == 40
    assert series.points[0].at < series.points[-1].at
    (change,) = series.changes
    assert change.index == 25
    assert moves_text(series) == f"Moved by +{change.change_ratio:.1%} from 7 Nov 2026 on.".replace("%", " %")
    assert moves_text(latencies(40, shift=0.0)) == "No change of level found."


def test_night_without_the_figure_is_left_out():
    """An INVALID session has no times in the history."""
    nights = make_comparisons(make_row(), 10)
    without = {name: value for name, value in nights[4].metrics.items() if "latency" not in name}
    nights[4] = nights[4].model_copy(update={"metrics": without})
    latency, size = read_series(nights, ["latency_ms_p50", "size_bytes"])
    assert (len(latency.points), len(size.points)) == (9, 10)
    assert latency.points[0].interval is not None
    assert size.points[0].interval is None
    assert read_series(nights, ["map50"]) == []


@pytest.mark.parametrize("nights", [1, 2, 5, 90])
def test_chart_has_a_mark_a_night(nights):
    drawn = ElementTree.fromstring(draw_series(latencies(nights), "p50"))
    assert sum("mark" in one.get("class", "").split() for one in drawn.iter()) == nights


def test_page_says_what_is_red_and_shows_the_rest():
    night = make_night()
    page = night_html(night)
    for told in (
        "digits on bench REGRESSED and detector on nano FAILED",
        "nano did not answer",
        "4,711 are recommended",
        "against digits.orin-nx version 3",
        "engine_version was 10.3 and is 10.7",
        "latency_ms_p50, night by night",
        "top1, night by night",
        "from 12 Nov 2026 on",
        "Orin NX of the tests",
    ):
        assert told in page, told
    assert "size_bytes, night by night" not in page, "it never changed"
    assert "SIMULATED" not in page


def test_sentence_of_calmer_nights():
    row = make_row()
    rows = {
        status: row.model_copy(update={"compared": row.compared.model_copy(update={"metrics": metrics})})
        for status, metrics in (("SAME", row.compared.metrics[:1]), ("UNKNOWN", row.compared.metrics[:2]))
    }
    assert night_sentence([rows["SAME"]]) == "Nothing is worse than the champions, in 1 comparison"
    told = night_sentence([rows["SAME"], rows["UNKNOWN"]])
    assert told == "Nothing is known to be worse; not decided: digits on bench UNKNOWN"


def test_simulated_figures_are_marked_wherever_they_stand():
    page = night_html(make_night(simulated=True))
    assert "night by night (SIMULATED)" in page
    assert page.count('class="tag">SIMULATED') == 1


def test_hostile_names_stay_text():
    night = make_night(variant=HOSTILE)
    rows = tuple(row.model_copy(update={"error": HOSTILE, "notes": (HOSTILE,)}) for row in night.result.rows)
    page = Page(night_html(replace(night, result=NightResult(run_id="0" * 32, rows=rows))))
    assert {name for name, _ in page.tags}.isdisjoint({"script", "img"})
    assert page.text.count("<script>alert('x')</script>") > 4
