"""What a reviewer sees in MLflow's own pages, in a real browser: the table of variants, two runs side by side, and
the report."""

import json
from urllib.parse import quote

import pytest
from doubles.browser import open_tab
from doubles.finished_run import make_run, store_run

from jetway.configs.load import load_recipe
from jetway.flows.report import log_report
from jetway.flows.ui import mlflow_pages
from jetway.tasks.report.headline import run_headline
from jetway.tasks.store import Store
from jetway.tasks.tracking.tracker import Tracker

pytestmark = pytest.mark.team

TARGETS = (("loopback",), ("loopback", "bench"))


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with open_tab(tmp_path_factory.mktemp("profile"), size=(2400, 1000)) as tab:
        yield tab


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two runs, one with another target too, and the address of the pages that show them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JETWAY_HOME", str(tmp_path_factory.mktemp("pages") / "a home"))
        recipe, _ = load_recipe("digits")
        tracker = Tracker()
        runs = [store_run(make_run(targets), recipe, tracker, Store()) for targets in TARGETS]
        for run_id in runs:
            log_report(tracker, run_id)
        with mlflow_pages(tracker.uri) as address:
            yield tracker, runs, address


def test_the_table_of_variants_has_the_columns_that_a_reviewer_sorts_by(tab, recorded):
    tracker, runs, address = recorded
    columns = ("latency_ms_p50", "size_bytes", "top1", "validity", "gate", "board")
    tab.open(
        f"{address}/{tracker.page_of_view(runs[0])}",
        *columns, "pruned-int8-qat on loopback", "baseline-fp32 on bench", "VALID",
    )  # fmt: skip
    assert len(tab.picture().getcolors(1 << 24)) > 50


def test_two_runs_stand_side_by_side(tab, recorded):
    tracker, runs, address = recorded
    children = [tracker.children(run_id)[0] for run_id in runs]
    experiment = tracker.page_of_run(runs[0]).split("/")[2]
    compared = {"runs": [child.run_id for child in children], "experiments": [experiment]}
    query = "&".join(f"{key}={quote(json.dumps(value))}" for key, value in compared.items())
    tab.open(f"{address}/#/compare-runs?{query}", "Comparing 2 Runs", "latency_ms_p50", children[0].name)
    assert len(tab.picture().getcolors(1 << 24)) > 50


def test_the_report_opens_from_its_link(tab, recorded):
    """As MLflow shows it: in a sandboxed frame, where its own content policy must let it be drawn."""
    tracker, runs, address = recorded
    headline = run_headline(make_run(TARGETS[1]).rows).sentence
    tab.open(f"{address}/{tracker.page_of(runs[1], 'report.html')}", "report.html", framed=headline)
    assert len(tab.picture().getcolors(1 << 24)) > 50
