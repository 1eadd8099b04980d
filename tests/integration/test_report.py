"""The report of a stored run: through the command, within its budget, and in a real browser, narrow and wide."""

import html
import json
import re
import shutil
import subprocess
import time

import pytest
from doubles.finished_night import make_night
from doubles.finished_run import VARIANTS, make_run, store_run

from jetway.configs.load import load_recipe
from jetway.flows.__main__ import main
from jetway.flows.record import REPORT_PATH, RESULT_PATH
from jetway.flows.report import log_report
from jetway.tasks.comparison import ComparedMetric, ComparedRow
from jetway.tasks.report.comparison_page import ComparisonMaterial, comparison_html
from jetway.tasks.report.nightly_page import night_html
from jetway.tasks.report.run_page import report_html
from jetway.tasks.store import Store
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.verdict import Change, Evidence

LIMIT_S, LIMIT_BYTES = 3.0, 3_000_000
LONG = "pruned-int8-ptq-mse-on-ort-tensorrt-with-a-name-that-never-seems-to-come-to-any-end-at-all"

#: Looks at the page as it is laid out: what is wider than the window, and text too faint for WCAG AA.
INSPECT = """
<script>
function channels(colour) { return colour.match(/[\\d.]+/g).map(Number); }
function luminance([r, g, b]) {
  const linear = [r, g, b].map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}
function backdrop(one) {
  for (; one; one = one.parentElement) {
    const found = getComputedStyle(one);
    if (found.backgroundImage.startsWith("repeating")) return [255, 212, 0];
    const colour = channels(found.backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
}
function contrast(one) {
  const drawn = one instanceof SVGElement;
  const front = luminance(channels(getComputedStyle(one)[drawn ? "fill" : "color"]));
  const back = luminance(backdrop(drawn ? one.closest("figure, section") : one));
  return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
}
function hasWords(one) {
  return [...one.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && one.getClientRects().length;
}
window.onload = () => {
  document.querySelectorAll("details").forEach(one => one.open = true);
  const words = [...document.querySelectorAll("body *")].filter(hasWords).filter(
    one => !one.closest("script") && !one.classList.contains("watermark"));
  const wide = [...document.querySelectorAll("body *")].filter(
    one => !one.closest(".scroll > *") && one.getBoundingClientRect().right > innerWidth + 0.5);
  const clipped = [...document.querySelectorAll("svg.chart text:not(.watermark)")].filter(one => {
    const outer = one.ownerSVGElement.getBoundingClientRect(), inner = one.getBoundingClientRect();
    return inner.left < outer.left - 1 || inner.right > outer.right + 1;
  });
  const faint = words.filter(one => contrast(one) < 4.5);
  const told = {
    width: innerWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches, words: words.length,
    scrolls: document.documentElement.scrollWidth > innerWidth,
    wide: wide.map(one => one.tagName + "." + one.className),
    clipped: clipped.map(one => one.textContent),
    faint: faint.map(one => one.textContent.slice(0, 40) + " " + contrast(one).toFixed(2)),
    smallest: Math.min(...words.map(one => parseFloat(getComputedStyle(one).fontSize) *
      (one instanceof SVGElement ? one.getScreenCTM().a : 1))),
  };
  parent.tell(window.name, told);
};
</script>
"""


#: Holds pages side by side, as a window is never narrower than 500 pixels, but a frame may be.
HOST = """<!doctype html><title></title><script>
const all = {};
function tell(name, told) { all[name] = told; document.title = JSON.stringify(all); }
</script>"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Opens pages, dark or light, each at several widths, and returns what INSPECT tells of it by name and width."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium (apt-get install chromium)")

    def inspect(pages, *, dark, widths=(390, 1280)):
        folder = tmp_path_factory.mktemp("browser")
        frames = [frame(f"{name} {width}", page, width) for name, page in pages.items() for width in widths]
        (folder / "host.html").write_text(HOST + "".join(frames))
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}", "--window-size=1300,1400",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=20000",
            "--dump-dom", (folder / "host.html").as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        told = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))
        return {(name, width): told[f"{name} {width}"] for name in pages for width in widths}

    return inspect


def frame(name, page, width):
    """The page in a frame that inspects it; its own policy lets no script run, this one neither."""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace(
        "</body>", INSPECT + "</body>"
    )
    style = f"border:0;width:{width}px;height:6000px"
    return f'<iframe name="{name}" style="{style}" srcdoc="{html.escape(page)}"></iframe>'


def compared():
    """Two rows: one got worse, and of the other nothing can be said."""
    told = {"p_value": 0.01, "count": 5000, "unit": "samples", "margin": 0.01, "rule": "non-inferiority"}
    evidence = Evidence(effect=0.03, interval=(0.02, 0.04), **told)
    values = {"before": 0.98, "after": 0.95}
    untold = ComparedMetric(metric="latency_ms_p50", change=Change.UNKNOWN, reason="because " * 20, **values)
    rows = [
        ComparedRow(
            variant=variant,
            target="bench",
            simulated=False,
            metrics=(ComparedMetric(metric="top1", change=change, evidence=evidence, **values), untold),
        )
        for variant, change in ((VARIANTS[-1], Change.REGRESSED), (LONG, Change.UNKNOWN))
    ]
    names = [*VARIANTS[:-1], LONG]
    invalid = make_run(["bench"], names, reasons=["drifted by 38 % " * 20], lineage=[])
    return ComparisonMaterial((make_run(["bench"]), invalid), rows, {"qat.epochs": ("3", "1")}, [LONG])


@pytest.fixture(scope="module")
def pages():
    names = [*VARIANTS[:-1], LONG]
    invalid = make_run(targets=["bench-a", "bench-b"], variants=names, reasons=["drifted by 38 % " * 20])
    return {
        "plain": report_html(make_run()),
        "simulated": report_html(make_run(simulated=True, gates=["*: size_ratio <= 0.01"])),
        "invalid, long names": report_html(invalid),
        "comparison": comparison_html(compared()),
        "night": night_html(make_night()),
        "simulated night, long names": night_html(make_night(nights=1, variant=LONG, simulated=True)),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_fit_and_can_be_read(chromium, pages, dark):
    for (kind, width), told in chromium(pages, dark=dark).items():
        assert (told["width"], told["dark"]) == (width, dark)
        assert told["words"] > 60
        assert not told["scrolls"], (kind, width)
        assert (told["wide"], told["clipped"], told["faint"]) == ([], [], []), (kind, width)
        assert told["smallest"] >= 9.5, (kind, width)


def test_the_inspection_sees_what_is_wrong(chromium):
    faint = '<p style="color:#999;background:#fff">faint words</p>'
    wide = '<p style="width:2000px">wide words</p>'
    page = f"<!doctype html><body>{faint}{wide}</body>"
    told = chromium({"bad": page}, dark=False, widths=[390])["bad", 390]
    assert told["scrolls"]
    assert told["wide"] == ["P."]
    assert [words[:11] for words in told["faint"]] == ["faint words"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One for all tests here: MLflow takes seconds to make a database."""
    return tmp_path_factory.mktemp("report") / "a home"


@pytest.fixture
def store(home, monkeypatch):
    """Records a run as a flow does, and returns its tracker and number."""
    monkeypatch.setenv("JETWAY_HOME", str(home))
    recipe, _ = load_recipe("digits")

    def store(**changes):
        tracker = Tracker()
        return tracker, store_run(make_run(**changes), recipe, tracker, Store())

    return store


def test_the_command_writes_it_again(store, monkeypatch, tmp_path, capsys):
    _, run_id = store(variants=VARIANTS[:2])
    monkeypatch.chdir(tmp_path)
    assert main(["report", run_id[:8]]) == 0
    name = f"jetway-report-{run_id[:8]}.html"
    assert capsys.readouterr().out == f"{name}\n"
    page = (tmp_path / name).read_text()
    for told in (
        run_id,
        "top1 against latency",
        "How long queries took",
        "workload.class_path",
        "onnxruntime 1.31.1",
        "dark, 3 digits",
    ):
        assert told in page
    assert "prune.round_to" in page
    assert "export.opset" not in page, "the recipe leaves it at its default"
    assert main(["report", "latest", "--output", "other.html"]) == 0
    assert (tmp_path / "other.html").read_text() == page


def test_the_command_says_why_there_is_no_report(store, tmp_path, capsys):
    tracker, run_id = store(variants=VARIANTS[:1], gates=[])
    failed = tracker.start_run("tiny", tags={"error": "BuildError: out of memory"})
    tracker.finish(failed, "FAILED")
    assert main(["report", failed]) == 6
    assert "FAILED and has no stage table: BuildError: out of memory" in capsys.readouterr().err
    assert main(["report", run_id, "--output", str(tmp_path / "no folder" / "report.html")]) == 2
    assert "name a file in a folder that is there" in capsys.readouterr().err


def test_what_an_older_run_did_not_keep_is_left_out(store):
    tracker, run_id = store(variants=VARIANTS[:2])
    folder = tracker.local_folder(run_id)
    (folder / "targets/loopback/samples.safetensors").unlink()
    (folder / "targets/loopback/stream.json").write_text('{"of": "another version"}')
    log_report(tracker, run_id)
    page = (folder / REPORT_PATH).read_text()
    assert "top1 against latency" in page
    assert "How long queries took" not in page
    assert "street.y4m" not in page


def test_a_page_that_cannot_be_drawn_is_told_and_costs_no_run(store, caplog):
    tracker, run_id = store(variants=VARIANTS[:1], gates=[])
    result = tracker.load_json(run_id, RESULT_PATH)
    tracker.log_json(run_id, RESULT_PATH, result | {"task_metrics": []})
    log_report(tracker, run_id)
    assert "has no report, because its page cannot be drawn" in caplog.text
    assert not tracker.has_file(run_id, REPORT_PATH)


@pytest.mark.serial
def test_a_large_report_is_made_in_time_and_stays_small(store):
    """Five variants on three targets, 20,000 queries each."""
    tracker, run_id = store(targets=["a", "b", "c"], queries=20_000)
    log_report(tracker, run_id)
    fresh = Tracker()
    started_s = time.perf_counter()
    log_report(fresh, run_id)
    assert time.perf_counter() - started_s <= LIMIT_S
    path = fresh.local_folder(run_id) / REPORT_PATH
    assert path.stat().st_size <= LIMIT_BYTES
    assert path.read_text().count("20,000 queries") == 15
