"""Champions in MLflow's model registry, on sqlite."""

import shutil
import time

import pytest
from doubles.many_runs import add_runs

from jetway.tasks.store import Store
from jetway.tasks.tracking.registry import model_name
from jetway.tasks.tracking.tracker import Tracker

RUNS = 10_000
LOOK_UP_LIMIT_S = 0.2
MODEL = model_name("digits", "loopback")


@pytest.fixture(scope="module")
def blank_database(tmp_path_factory):
    """A database with its tables, which take seconds to make."""
    folder = tmp_path_factory.mktemp("blank")
    Tracker(f"sqlite:///{folder / 'mlflow.db'}").pipeline_runs()
    return folder / "mlflow.db"


@pytest.fixture
def tracker(tmp_path, blank_database, monkeypatch):
    shutil.copy(blank_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("JETWAY_HOME", str(tmp_path))
    return Tracker()


def start_variant(tracker, variant="pruned-int8-qat"):
    """A run with a variant's run in it; their ids."""
    parent = tracker.start_run("digits", run_name="digits of a night")
    tags = {"variant": variant, "target": "loopback", "precision": "int8"}
    return parent, tracker.start_child(parent, f"{variant} on loopback", {}, tags)


def test_no_champion_before_the_first_promotion(tracker):
    assert tracker.champion(MODEL) is None


def test_promotion_makes_a_version_with_the_runs_files(tracker):
    parent, child = start_variant(tracker)
    handle = Store().add_json({"engine": 1})
    tracker.log_files(child, {"engine.engine": (handle, Store().open(handle))})
    promoted = tracker.promote(MODEL, child, "The first.", {"target_class": "loopback"})
    assert promoted == Tracker().champion(MODEL)
    assert (promoted.run_id, promoted.variant, promoted.version) == (parent, "pruned-int8-qat", 1)
    version = tracker._mlflow.client.get_model_version_by_alias(MODEL, "champion")
    assert (version.run_id, version.description, version.status) == (child, "The first.", "READY")
    assert version.tags["recipe"] == "digits"
    assert version.tags["target_class"] == "loopback"
    assert version.source == tracker.local_folder(child).as_uri()


def test_alias_moves_and_comes_back_to_the_version_it_was_at(tracker):
    (_, first), (_, second) = start_variant(tracker), start_variant(tracker)
    versions = [tracker.promote(MODEL, child, "", {}).version for child in (first, second, first)]
    assert versions == [1, 2, 1]
    assert tracker.champion(MODEL).version == 1


def test_models_of_several_classes_are_apart(tracker):
    _, child = start_variant(tracker)
    tracker.promote(MODEL, child, "", {})
    assert tracker.champion(model_name("digits", "orin")) is None


@pytest.mark.serial
def test_look_up_among_ten_thousand_runs(tracker, tmp_path):
    """The champion and the record of its run, by a tracker that has the database open."""
    parent, child = start_variant(tracker)
    tracker.promote(MODEL, child, "", {})
    tags = {"jetway.kind": "pipeline", "recipe": "digits", "target": "loopback", "gate": "PASS"}
    experiment_id = tracker._mlflow.client.get_run(parent).info.experiment_id
    add_runs(tmp_path / "mlflow.db", experiment_id, [tags] * RUNS)
    fresh = Tracker()
    assert len(fresh.pipeline_runs(limit=RUNS + 1)) == RUNS + 1
    started_s = time.perf_counter()
    champion = fresh.champion(MODEL)
    run = fresh.find_run(champion.run_id)
    seconds = time.perf_counter() - started_s
    assert run.name == "digits of a night"
    assert seconds <= LOOK_UP_LIMIT_S
