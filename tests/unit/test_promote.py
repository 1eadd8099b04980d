"""Promotion of what a finished run made, on sqlite: boards of a class have one champion."""

import shutil

import pytest
from doubles.finished_run import make_run, store_run

from jetway.configs.load import load_recipe
from jetway.flows.nightly import Night, promote_night
from jetway.flows.promote import by_class, promote_run
from jetway.flows.stored_run import StoredRun
from jetway.tasks.errors import ConfigError
from jetway.tasks.nightly import NightRow, Policy
from jetway.tasks.store import Store
from jetway.tasks.tracking.registry import model_name
from jetway.tasks.tracking.tracker import Tracker

BOARDS = ("nano-1", "nano-2", "orin")
CLASSES = {"nano-1": "nano", "nano-2": "nano", "orin": "orin"}
VARIANT = "pruned-fp32"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run on two boards of one class and on another, in MLflow; all gates of the variant passed."""
    home = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JETWAY_HOME", str(home))
        tracker = Tracker()
        made = make_run(BOARDS, ("baseline-fp32", VARIANT), gates=("*: size_ratio <= 1.0",))
        run_id = store_run(made, load_recipe("digits")[0], tracker, Store())
        for child in tracker.children(run_id):
            tracker.set_tags(child.run_id, {"target_class": CLASSES[child.tags["target"]]})
    return home, run_id, made


@pytest.fixture
def run(recorded, tmp_path, monkeypatch):
    """The run in a database of its own."""
    home, run_id, made = recorded
    shutil.copy(home / "mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.setenv("JETWAY_HOME", str(tmp_path))
    return run_id, made


def champions():
    found = {one.model: (one.target, one.version) for one in Tracker().champions()}
    return {name: found.get(model_name("digits", name)) for name in ("nano", "orin")}


def test_by_hand_a_class_is_promoted_once(run, capsys):
    promote_run(run[0], VARIANT, [])
    assert champions() == {"nano": ("nano-1", 1), "orin": ("orin", 1)}
    assert "nano-2 shares the champion of nano-1, as its class is nano." in capsys.readouterr().out
    promote_run(run[0], VARIANT, ["nano-2"])
    assert champions()["nano"] == ("nano-2", 2)


def test_the_champion_has_the_package_that_its_run_made(run):
    tracker, run_id = Tracker(), run[0]
    package = Store().add_json({"a": "package"})
    tracker.log_files(run_id, {"targets/orin/package.zip": (package, Store().open(package))})
    tracker.set_tags(run_id, {"package.orin": VARIANT})
    promote_run(run_id, VARIANT, [])
    for target_class, packaged in (("orin", True), ("nano", False)):
        version = tracker._mlflow.client.get_model_version_by_alias(
            model_name("digits", target_class), "champion"
        )
        assert ("package to deploy" in version.description) is packaged
        assert (tracker.files(version.run_id).get("package.zip") == package) is packaged


def test_several_winners_in_a_class_are_refused(run):
    stored = StoredRun(Tracker(), run[0])
    rows = {(row.variant, row.target): row for row in stored.result.rows}
    nano = [rows[VARIANT, "nano-1"], rows["baseline-fp32", "nano-2"]]
    with pytest.raises(ConfigError, match=r"class nano .* pruned-fp32 on nano-1, baseline-fp32 on nano-2"):
        by_class(stored, nano)
    assert list(by_class(stored, [nano[0], rows["baseline-fp32", "orin"]])) == ["nano", "orin"]


def test_a_night_promotes_once_a_class(run):
    run_id, made = run
    candidates = {row.target: row for row in made.rows if row.variant == VARIANT}
    rows = [
        NightRow(recipe="digits", target=name, target_class=CLASSES[name], run_id=run_id, candidate=row)
        for name, row in candidates.items()
    ]
    first, second, other = promote_night(Night(Tracker(), "f" * 32), rows, Policy.ON_IMPROVEMENT)
    assert (first.promoted.target, second.promoted, other.promoted.target) == ("nano-1", None, "orin")
    assert "not promoted: digits on nano-1 was, and the class nano has one champion" in second.notes
    assert champions() == {"nano": ("nano-1", 1), "orin": ("orin", 1)}


def test_a_promotion_that_fails_leaves_the_verdict(run):
    run_id, made = run
    candidate = made.rows[-1].model_copy(update={"variant": "not of the run"})
    common = {"recipe": "digits", "target_class": "orin", "candidate": candidate}
    lost = NightRow(**common, target="orin", run_id="0" * 32)
    strange = NightRow(**{**common, "recipe": "other"}, target="orin", run_id=run_id)
    rows = promote_night(Night(Tracker(), "f" * 32), [lost, strange], Policy.ON_IMPROVEMENT)
    assert [row.promoted for row in rows] == [None, None]
    assert [row.status for row in rows] == ["NEW", "NEW"]
    assert rows[0].notes[0].startswith("not promoted: no run '00000000000000000000000000000000'")
    assert rows[1].notes[0].startswith("not promoted: KeyError")
