"""``jetway compare`` on stored runs, through the command."""

import json
import logging

import numpy as np
import pytest
import yaml
from doubles.servers import MlflowServer

from jetway.flows import compare
from jetway.flows.record import COMPARISONS_SHOWN, RESULT_PATH, RunResult
from jetway.tasks.metrics import Metric
from jetway.tasks.results import VariantResult
from jetway.tasks.store import Store
from jetway.tasks.tracking import tracker as tracking
from jetway.tasks.tracking.tracker import Tracker

ENGINES, DATA = {"first": "1" * 64, "second": "2" * 64}, "d" * 64


@pytest.fixture
def here(jetway_here, tmp_path):
    return lambda *arguments: jetway_here("compare", *arguments, cwd=tmp_path)


@pytest.fixture
def store_run(jetway_here, cli_home):
    """Stores a finished run of one variant as ``jetway run`` does, and returns its id."""

    def store(
        name,
        right,
        *,
        samples=5000,
        params=(),
        variant="pruned-int8-qat",
        metric="top1",
        recipe="name: digits",
        **metrics,
    ):
        tracker, files = Tracker(), Store()
        records = [{"top1": float(i < right)} for i in range(samples)]
        row = VariantResult(
            variant=variant, target="loopback", precision="int8", engine="onnxruntime", board="a board",
            metrics={"top1": float(np.mean([record["top1"] for record in records])), **metrics},
        )  # fmt: skip
        run_id = tracker.start_run("digits", {"seed": 0, **dict(params)}, run_name=f"digits {name}")
        child = tracker.start_child(run_id, variant, tags={"variant": variant, "target": "loopback"})
        handle = files.add_json(records, parents=(ENGINES[name], DATA))
        tracker.log_files(child, {"records.json": (handle, files.open(handle))})
        tracker.finish(child, "FINISHED")
        result = RunResult(run_id=run_id, exit_code=0, rows=(row,), task_metrics=(Metric(name=metric),))
        tracker.log_json(run_id, RESULT_PATH, result.model_dump(mode="json"))
        tracker.log_text(run_id, "recipe.yaml", recipe)
        tracker.log_json(run_id, "environment.json", {"git_commit": f"commit of {name}"})
        tracker.finish(run_id, "FINISHED")
        return run_id

    return store


def test_drop_of_accuracy_is_a_regression(store_run, here):
    first = store_run("first", 4900, params={"qat.epochs": 3}, latency_ms_p50=1.0, size_bytes=1000.0)
    second = store_run("second", 4750, params={"qat.epochs": 1}, latency_ms_p50=1.0, size_bytes=900.0)
    compared = here(first, second, "--json")
    assert compared.exit_code == 1
    document = compared.json
    assert (document["change"], document["exit_code"]) == ("REGRESSED", 1)
    assert document["params"] == {"qat.epochs": ["3", "1"]}
    changes = {one["metric"]: one["change"] for one in document["rows"][0]["metrics"]}
    assert changes == {"top1": "REGRESSED", "size_bytes": "IMPROVED", "latency_ms_p50": "UNKNOWN"}
    told = here(first, second)
    assert told.exit_code == 1
    for text in (
        "pruned-int8-qat on loopback",
        "UNKNOWN, not measured in turns: latency_ms_p50 of pruned-int8-qat on loopback",
        "sessions differ from each other",
        "qat.epochs",
        "drop 0.0300",
    ):
        assert text in told.stdout
    assert "seed" not in told.stdout


def test_a_comparison_as_a_page(store_run, here, tmp_path):
    first = store_run("first", 4900, params={"qat.epochs": 3})
    second = store_run("second", 4750, params={"qat.epochs": 1})
    assert here(first, second, "--report", tmp_path / "changes.html").exit_code == 1
    page = (tmp_path / "changes.html").read_text()
    for told in (
        "Worse: top1 of pruned-int8-qat on loopback",
        "How much worse top1 is",
        "qat.epochs",
        second[:8],
        "commit of second",
        "answers, sha256",
    ):
        assert told in page
    nowhere = here(first, second, "--report", tmp_path / "no folder" / "changes.html")
    assert (nowhere.exit_code, "name a file in a folder" in nowhere.stderr) == (2, True)


def test_a_comparison_is_kept_with_the_second_run_and_linked_from_its_description(store_run, here):
    first = store_run("first", 4900, latency_ms_p50=1.0)
    second = store_run("second", 4750, latency_ms_p50=1.0)
    tracker = Tracker()
    tracker.describe(second, "A recipe.\n\n[The report](#/report) has charts.\n\n| a | table |")
    printed = here(first, second, "--json").json
    assert here(first, second, "--metric", "latency_ms_p50").exit_code == 5

    recipe, report, compared, table = description(tracker, second)
    assert (recipe, report, table) == ("A recipe.", "[The report](#/report) has charts.", "| a | table |")
    newer, older = compared.splitlines()[1:]
    assert newer.startswith("- [UNKNOWN](")
    assert older.startswith("- [REGRESSED](")
    folder = tracker.local_folder(second)
    pages = {tracker.page_of(second, str(one.relative_to(folder))): one for one in folder.rglob("*.html")}
    (path,) = (path for page, path in pages.items() if f"({page})" in older)
    assert path.parent == folder / "comparisons" / first[:8]
    assert json.loads(path.with_suffix(".json").read_text()) == printed
    assert "Worse: top1 of pruned-int8-qat on loopback" in path.read_text()
    assert f"[{first[:8]}]({tracker.page_of_run(first)})" in older
    assert description(tracker, first) == [""]


def description(tracker, run_id):
    return tracker.run(run_id).tags.get("mlflow.note.content", "").split("\n\n")


def test_a_description_links_the_newest_comparisons():
    told = ""
    for number in range(COMPARISONS_SHOWN + 2):
        told = compare.with_comparison(told, f"number {number}")
    assert told.splitlines() == ["Compared:", *(f"- number {number}" for number in (6, 5, 4, 3, 2))]


@pytest.mark.team
def test_a_comparison_stands_where_mlflow_goes_away_meanwhile(store_run, here, tmp_path, monkeypatch, caplog):
    server = MlflowServer(tmp_path / "server")
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setattr(tracking, "PATIENCE_S", 1.0)
    first, second = (store_run(name, 4900) for name in ENGINES)
    tell = compare.print_comparison

    def tell_and_lose_mlflow(comparison):
        tell(comparison)
        server.kill()

    monkeypatch.setattr(compare, "print_comparison", tell_and_lose_mlflow)
    compared = here(first, second)
    assert (compared.exit_code, "SAME: " in compared.stdout) == (0, True)
    told = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert any(f"run {second[:8]} does not keep this comparison" in one for one in told), told


def test_metrics_by_name_can_pass(store_run, here):
    first, second = (store_run(name, 4900, latency_ms_p50=1.0, size_bytes=9.0) for name in ENGINES)
    assert here(first, second).exit_code == 5
    passed = here(first[:12], second[:12], "--metric", "top1", "--metric", "size_bytes", "--json")
    assert (passed.exit_code, passed.json["change"]) == (0, "SAME")


def test_a_wider_margin_lets_a_drop_pass(store_run, here):
    first, second = store_run("first", 4900), store_run("second", 4800)
    assert here(first, second).exit_code == 1
    assert here(first, second, "--margin", "0.05").exit_code == 0


MODULE = """
from my_package.my_module import MyWorkload
from jetway.tasks.metrics import Metric


class Squared(MyWorkload):
    metrics = (Metric(name="squared"),)

    def summarize(self, records):
        return {"squared": (sum(record["top1"] for record in records) / len(records)) ** 2}
"""


@pytest.mark.parametrize(
    ("module", "change", "reason"),
    [
        (MODULE, "REGRESSED", ""),
        (MODULE.replace("** 2", "** 3"), "UNKNOWN", "summarize() gives other values than were recorded"),
        (MODULE.replace("top1", "top5"), "UNKNOWN", "summarize() fails on records: KeyError: 'top5'"),
        (None, "UNKNOWN", "cannot import 'my_package.my_squares'"),
    ],
)
def test_score_that_is_no_mean_is_resampled_by_the_workloads_code(
    module, change, reason, store_run, project, jetway_here
):
    if module:
        (project / "my_package/my_squares.py").write_text(module)
    recipe = yaml.safe_load((project / "my_recipe.yaml").read_text())
    recipe["workload"] = {"class_path": "my_package.my_squares:Squared"}
    recipe["gates"] = []
    stored = [
        store_run(name, right, metric="squared", squared=(right / 5000) ** 2, recipe=yaml.safe_dump(recipe))
        for name, right in (("first", 4900), ("second", 4750))
    ]
    compared = jetway_here("compare", *stored, "--json", cwd=project)
    (found,) = compared.json["rows"][0]["metrics"]
    assert found["change"] == change
    assert reason in found["reason"]


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "nan", "much"])
def test_margin_wants_a_share(share, here, capsys):
    with pytest.raises(SystemExit, match="2"):
        here("a", "b", "--margin", share)
    assert "is no share above 0 and below 1" in capsys.readouterr().err


def test_what_cannot_be_compared_is_explained(store_run, here):
    first, other = store_run("first", 4900), store_run("second", 4900, variant="baseline-fp32")
    same = here(first, first)
    assert (same.exit_code, "Both are run" in same.stderr) == (2, True)
    assert f"jetway report {first[:8]}" in same.stderr
    variant = Tracker().children(first)[0].run_id
    below = here(variant, other)
    assert (below.exit_code, f"is a variant of run {first[:8]}" in below.stderr) == (6, True)
    apart = here(first, other)
    assert (apart.exit_code, "share no variant on a target" in apart.stderr) == (2, True)
    unknown = here(first, "feedbeef", "--json")
    assert (unknown.exit_code, unknown.json["exit_code"]) == (6, 6)
