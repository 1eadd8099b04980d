"""What `jetway clean` frees, and what it leaves alone."""

import os
import time
from pathlib import Path

import pytest

from jetway.flows.clean import clean
from jetway.tasks.artifacts import Checkpoint, StageOutput, json_sha256
from jetway.tasks.errors import ConfigError
from jetway.tasks.store import Store, jetway_home
from jetway.tasks.tracking.index import MlflowStageIndex
from jetway.tasks.tracking.tracker import Tracker

PAST_S = 1_000_000_000


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    """One embedded database for this file: making its tables takes seconds."""
    home = tmp_path_factory.mktemp("clean")
    return Tracker(f"sqlite:///{home / 'mlflow.db'}")


@pytest.fixture(autouse=True)
def home(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without runs: those of earlier tests are deleted."""
    folder = Path(tracker.uri.removeprefix("sqlite:///")).parent
    monkeypatch.setenv("JETWAY_HOME", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for run in tracker.search(""):
        if run.status == "RUNNING":
            tracker.finish(run.run_id, "KILLED")
        tracker.delete_run(run.run_id)
    clean(0, tracker=tracker)
    return folder


def key_of(name: str) -> str:
    return json_sha256(name)


def run_pipeline(tracker: Tracker, *stages: str, status: str = "FINISHED") -> tuple[str, list[Checkpoint]]:
    """A pipeline run that made or reused the named stages, each of one checkpoint named like it."""
    store, run_id = Store(), tracker.start_run("digits")
    index = MlflowStageIndex(tracker, store, run_id=run_id)
    handles = []
    for stage in stages:
        output = index.find(key_of(stage)) or record(index, store, stage)
        handle = output.handle
        assert isinstance(handle, Checkpoint)
        tracker.log_files(run_id, {f"{stage}/{stage}.safetensors": (handle, store.open(handle))})
        handles.append(handle)
    table = store.add_json({"stages": stages})
    tracker.log_files(run_id, {"compare/table.json": (table, store.open(table))})
    if status == "FINISHED":
        tracker.finish(run_id, "FINISHED")
    time.sleep(0.01)
    return run_id, handles


def record(index: MlflowStageIndex, store: Store, stage: str) -> StageOutput:
    with store.scratch() as folder:
        (folder / "weights").write_bytes(stage.encode() * 1000)
        output = StageOutput(handle=store.add(Checkpoint, folder / "weights"))
    index.record(key_of(stage), stage, output, 1.0)
    return output


def test_clean_keeps_what_the_newest_run_needs_and_frees_the_rest(tracker: Tracker) -> None:
    old, (shared, gone) = run_pipeline(tracker, "load", "old-prune")
    kept, (_, stays) = run_pipeline(tracker, "load", "new-prune")
    report = clean(1)
    store, index = Store(), MlflowStageIndex(tracker, Store())
    assert [store.has(handle) for handle in (shared, stays, gone)] == [True, True, False]
    assert index.find(key_of("load")) is not None
    assert index.find(key_of("new-prune")) is not None
    assert index.find(key_of("old-prune")) is None
    assert (report.kept_runs, report.removed_entries) == (1, 1)
    assert gone.size_bytes <= report.freed_bytes < gone.size_bytes + 4000
    folder = tracker.local_folder(kept)
    assert folder is not None
    assert (folder / "new-prune/new-prune.safetensors").stat().st_size == stays.size_bytes
    assert tracker.load_json(old, "compare/table.json") == {"stages": ["load", "old-prune"]}
    assert "freed" in str(report)


def test_clean_lets_a_kept_run_reuse_every_stage(tracker: Tracker) -> None:
    run_pipeline(tracker, "a", "b")
    run_pipeline(tracker, "b", "c")
    clean(1)
    newest, _ = run_pipeline(tracker, "b", "c")
    stages = tracker.load_json(newest, "stages.json")["stages"]
    assert [stage["reused"] for stage in stages] == [True, True]


def test_clean_twice_frees_nothing_more(tracker: Tracker) -> None:
    run_pipeline(tracker, "a")
    run_pipeline(tracker, "b")
    assert clean(1).freed_bytes > 0
    again = clean(1)
    assert (again.freed_bytes, again.removed_files, again.removed_entries) == (0, 0, 0)


def test_clean_keeping_none_empties_the_store(tracker: Tracker, home: Path) -> None:
    run_pipeline(tracker, "a", "b")
    clean(0)
    assert not [path for path in (home / "store").rglob("*") if path.is_file()]


def test_clean_leaves_a_running_pipeline_alone(tracker: Tracker, home: Path) -> None:
    _, (earlier,) = run_pipeline(tracker, "early")
    os.utime(Store().path_of(earlier), (PAST_S, PAST_S))
    _, (reused,) = run_pipeline(tracker, "reused")
    os.utime(Store().path_of(reused), (PAST_S, PAST_S))
    running = tracker.start_run("digits")
    MlflowStageIndex(tracker, Store()).find(key_of("reused"))
    with Store().scratch() as folder:
        (folder / "work").write_bytes(b"in progress")
        resume = home / "work" / "key"
        resume.mkdir(parents=True)
        made = record(MlflowStageIndex(tracker, Store()), Store(), "just made").handle
        clean(0)
        assert (folder / "work").exists()
        assert resume.exists()
    store = Store()
    assert [store.has(handle) for handle in (earlier, reused, made)] == [False, True, True]
    tracker.finish(running, "FINISHED")


def test_clean_removes_old_resume_folders_and_orphans(tracker: Tracker, home: Path) -> None:
    old, orphan = home / "work" / "old", home / "store" / "tmp" / "orphan"
    for folder in (old, orphan):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "file").write_bytes(b"x" * 5000)
        os.utime(folder, (PAST_S, PAST_S))
    run_pipeline(tracker, "a")
    new = jetway_home() / "work" / "new"
    new.mkdir()
    report = clean(1)
    assert (old.exists(), orphan.exists(), new.exists()) == (False, False, True)
    assert (report.removed_folders, report.freed_bytes) == (2, 10_000)


def test_clean_touches_no_entry_of_a_server_that_may_serve_others(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (handle,) = run_pipeline(tracker, "a")
    monkeypatch.setenv("JETWAY_HOME", str(tmp_path / "another home"))
    mine = Store()
    found = MlflowStageIndex(tracker, mine).find(key_of("a"))
    assert found is not None
    assert mine.has(handle)
    report = clean(0, tracker=Tracker(tracker.uri))
    assert (report.removed_entries, mine.has(handle)) == (0, False)
    assert MlflowStageIndex(tracker, mine).find(key_of("a")) is not None


def test_clean_refuses_a_negative_number() -> None:
    with pytest.raises(ConfigError, match="--keep is -1"):
        clean(-1)


def test_clean_keeps_what_a_champion_needs(tracker: Tracker) -> None:
    """Nights to come measure its engine again, however many runs there were since."""
    old, (weights,) = run_pipeline(tracker, "load")
    child = tracker.start_child(old, "pruned on loopback", {}, {"variant": "pruned", "target": "loopback"})
    tracker.finish(child, "FINISHED")
    tracker.promote("digits.loopback", child, "", {})
    run_pipeline(tracker, "new-load")
    clean(1)
    assert Store().has(weights)
