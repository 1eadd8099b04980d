"""What a reviewer sees in MLflow's own pages, in a real browser: the table of variants, two runs side by side, and
the report."""

import json
import re
import shutil
import subprocess
from urllib.parse import quote

import pytest
from doubles.finished_run import make_run, store_run
from PIL import Image

from jetway.configs.load import load_recipe
from jetway.flows.report import log_report
from jetway.flows.ui import mlflow_pages
from jetway.tasks.store import Store
from jetway.tasks.tracking.tracker import Tracker

pytestmark = pytest.mark.team


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    """Opens an address and returns the text of the page and a picture of it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium (apt-get install chromium)")

    def look(address):
        folder = tmp_path_factory.mktemp("browser")
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={folder / 'profile'}", "--window-size=2400,1000", "--virtual-time-budget=30000",
            f"--screenshot={folder / 'page.png'}", "--dump-dom", address,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        with Image.open(folder / "page.png") as picture:
            return words_of(done.stdout), picture.convert("RGB")

    return look


def words_of(dom):
    """The text of a page, whose tags MLflow does not all close."""
    without = re.sub(r"<(script|style).*?</\1>", " ", dom, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", without).split())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two runs, one with another target too, and the address of the pages that show them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JETWAY_HOME", str(tmp_path_factory.mktemp("pages") / "a home"))
        recipe, _ = load_recipe("digits")
        tracker = Tracker()
        runs = [
            store_run(make_run(targets), recipe, tracker, Store())
            for targets in (("loopback",), ("loopback", "bench"))
        ]
        for run_id in runs:
            log_report(tracker, run_id)
        with mlflow_pages(tracker.uri) as address:
            yield tracker, runs, address


def test_the_table_of_variants_has_the_columns_that_a_reviewer_sorts_by(look, recorded):
    tracker, runs, address = recorded
    words, picture = look(f"{address}/{tracker.page_of_view(runs[0])}")
    for name in ("latency_ms_p50", "size_bytes", "top1", "validity", "gate", "board"):
        assert name in words, name
    for name in ("pruned-int8-qat on loopback", "baseline-fp32 on bench", "VALID"):
        assert name in words, name
    assert len(picture.getcolors(1 << 24)) > 50


def test_two_runs_stand_side_by_side(look, recorded):
    tracker, runs, address = recorded
    children = [tracker.children(run_id)[0] for run_id in runs]
    experiment = tracker.page_of_run(runs[0]).split("/")[2]
    compared = {"runs": [child.run_id for child in children], "experiments": [experiment]}
    query = "&".join(f"{key}={quote(json.dumps(value))}" for key, value in compared.items())
    words, picture = look(f"{address}/#/compare-runs?{query}")
    for text in ("Comparing 2 Runs", "latency_ms_p50", children[0].name):
        assert text in words, text
    assert len(picture.getcolors(1 << 24)) > 50


def test_the_report_opens_from_its_link(look, recorded):
    tracker, runs, address = recorded
    words, picture = look(f"{address}/{tracker.page_of(runs[1], 'report.html')}")
    assert "report.html" in words
    assert len(picture.getcolors(1 << 24)) > 50
