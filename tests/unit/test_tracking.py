"""Runs, files and the stage index on a sqlite database."""

import json
import logging
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jetway.configs.schema import QatConfig
from jetway.tasks import environment
from jetway.tasks.artifacts import Checkpoint, Report, StageOutput, json_sha256
from jetway.tasks.errors import TrackingError, TrackingUnreachableError
from jetway.tasks.store import Store
from jetway.tasks.tracking.connection import translated, without_password
from jetway.tasks.tracking.index import MlflowStageIndex, used_keys
from jetway.tasks.tracking.spool import Line, Point, Spool, Write, left_spools
from jetway.tasks.tracking.tracker import Tracker
from jetway.tasks.tracking.values import BOOT_TAG, NOTE_TAG, PARAM_CHARACTERS, flat_params, short_text

KEY = json_sha256("a stage's key")
NAN = float("nan")


@pytest.fixture(scope="module")
def blank_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables, which take seconds to make."""
    folder = tmp_path_factory.mktemp("blank")
    Tracker(f"sqlite:///{folder / 'mlflow.db'}").pipeline_runs()
    return folder / "mlflow.db"


@pytest.fixture
def home(tmp_path: Path, blank_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "a home"
    folder.mkdir()
    shutil.copy(blank_database, folder / "mlflow.db")
    monkeypatch.setenv("JETWAY_HOME", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@pytest.fixture
def tracker(home: Path) -> Tracker:
    return Tracker()


def add_checkpoint(store: Store, content: bytes) -> Checkpoint:
    with store.scratch() as folder:
        path = folder / "weights"
        path.write_bytes(content)
        return store.add(Checkpoint, path)


def add_output(store: Store, content: bytes = b"weights") -> StageOutput:
    handle = add_checkpoint(store, content)
    return StageOutput(handle=handle, files={"notes.json": store.add_json({"a": 1})}, metrics={"macs": 12.0})


def test_tracker_records_a_parent_and_children_with_the_same_metric_names(tracker: Tracker) -> None:
    parent = tracker.start_run("digits", {"qat.epochs": 3}, {"target": "loopback"}, run_name="try")
    for variant in ("baseline-fp32", "pruned-fp32"):
        child = tracker.start_child(parent, variant, {"opset": 17}, {"variant": variant})
        tracker.log_metrics(child, {"top1": 0.97, "peak_memory_mib": None})
        tracker.finish(child, "FINISHED")
    tracker.finish(parent, "FINISHED")
    run, children = tracker.run(parent), tracker.children(parent)
    assert (run.experiment, run.name, run.status) == ("digits", "try", "FINISHED")
    assert (run.params, run.tags["target"]) == ({"qat.epochs": "3"}, "loopback")
    assert [child.name for child in children] == ["baseline-fp32", "pruned-fp32"]
    assert [child.metrics for child in children] == [{"top1": 0.97}] * 2
    assert children[0].tags["recipe"] == "digits"
    assert [record.run_id for record in tracker.pipeline_runs()] == [parent]


def test_samples_of_sensors_keep_their_time_and_leave_out_what_was_not_read(tracker: Tracker) -> None:
    run_id = tracker.start_run("digits")
    times_s = [100.0 + 0.1 * step for step in range(900)]
    tracker.log_time_series(
        run_id,
        times_s,
        {"power_w.VDD_IN": [5.0] * 900, "temperature_c.gpu@0 (hot)": [NAN, 40.5] * 450},
    )
    power = tracker._mlflow.client.get_metric_history(run_id, "power_w.VDD_IN")
    assert len(power) == 900
    power.sort(key=lambda metric: metric.step)
    assert power[-1].timestamp - power[0].timestamp == pytest.approx(89_900, abs=2)
    assert abs(power[-1].timestamp / 1000 - time.time()) < 60
    warm = tracker._mlflow.client.get_metric_history(run_id, "temperature_c.gpu_0 _hot_")
    assert {metric.step % 2 for metric in warm} == {1}


def test_no_samples_are_no_series(tracker: Tracker) -> None:
    run_id = tracker.start_run("digits")
    tracker.log_time_series(run_id, [], {"power_w.VDD_IN": []})
    assert tracker.run(run_id).metrics == {}


def test_tracker_batches_beyond_mlflows_limits(tracker: Tracker) -> None:
    run_id = tracker.start_run("digits", {f"section.key_{i}": i for i in range(250)})
    tracker.set_tags(run_id, {f"tag_{i}": "x" for i in range(150)})
    tracker.log_series(run_id, [(step, {"loss": step / 10}) for step in range(1700)])
    tracker.log_metrics(run_id, {f"metric_{i}": float(i) for i in range(900)})
    run = tracker.run(run_id)
    assert (len(run.params), len(run.metrics)) == (250, 901)
    assert {f"tag_{i}" for i in range(150)} <= set(run.tags)
    assert run.metrics["loss"] == pytest.approx(169.9)


def test_tracker_cuts_what_is_too_long_and_says_so(tracker: Tracker) -> None:
    run_id = tracker.start_run("digits", {"workload.options": "x" * 9000}, {"note": "y" * 9000})
    run = tracker.run(run_id)
    assert len(run.params["workload.options"]) == PARAM_CHARACTERS
    assert run.params["workload.options"].endswith("[cut: 9000 characters]")
    assert run.tags["note"].endswith("[cut: 9000 characters]")


def test_tracker_takes_hostile_text_as_data(tracker: Tracker) -> None:
    text = "'; DROP TABLE runs; -- $(rm -rf ~) \n \"`"
    run_id = tracker.start_run("digits", {"recipe.description": text}, {"error": text})
    tracker.describe(run_id, text)
    run = tracker.run(run_id)
    assert (run.params["recipe.description"], run.tags["error"], run.tags[NOTE_TAG]) == (text,) * 3


def test_a_run_gets_another_name(tracker: Tracker) -> None:
    run_id = tracker.start_run("digits", run_name="first")
    tracker.rename(run_id, "second")
    assert tracker.run(run_id).name == "second"


def test_tracker_links_files_and_remembers_their_handles(tracker: Tracker, home: Path) -> None:
    store = Store()
    run_id = tracker.start_run("digits")
    pruned, report = add_checkpoint(store, b"pruned"), store.add_json({"macs": 1})
    tracker.log_files(run_id, {"prune/pruned.safetensors": (pruned, store.open(pruned))})
    tracker.log_files(run_id, {"analyze/analysis.json": (report, store.open(report))})
    tracker.log_text(run_id, "recipe.yaml", "name: digits\n")
    (attached,) = (home / "mlartifacts").rglob("pruned.safetensors")
    assert attached.samefile(store.path_of(pruned))
    expected = {"prune/pruned.safetensors": pruned, "analyze/analysis.json": report}
    assert tracker.files(run_id) == Tracker().files(run_id) == expected
    assert tracker.load_json(run_id, "analyze/analysis.json") == {"macs": 1}


def test_tracker_overwrites_a_file_of_the_same_path(tracker: Tracker) -> None:
    run_id = tracker.start_run("digits")
    tracker.log_json(run_id, "table.json", {"rows": 1})
    tracker.log_json(run_id, "table.json", {"rows": 2})
    assert tracker.load_json(run_id, "table.json") == {"rows": 2}


def test_tracker_finds_runs_by_prefix_name_and_latest(tracker: Tracker) -> None:
    first = tracker.start_run("digits", run_name="first")
    time.sleep(0.01)
    second = tracker.start_run("other", run_name="second")
    assert tracker.find_run(first[:8]).run_id == first
    assert tracker.find_run("second").run_id == second
    assert tracker.find_run("latest").run_id == second
    with pytest.raises(TrackingError, match=rf"no run 'nothing'.*{second[:8]} \(other\)"):
        tracker.find_run("nothing")
    with pytest.raises(TrackingError, match="2 runs fit ''"):
        tracker.find_run("")


def test_tracker_finds_a_whole_run_by_its_id_and_no_part_of_one(tracker: Tracker) -> None:
    run_id = tracker.start_run("digits")
    fallback = tracker.start_child(run_id, "smaller", kind="fallback")
    variant = tracker.start_child(fallback, "pruned-fp32 on bench")
    assert [tracker.find_run(one).run_id for one in (run_id, fallback)] == [run_id, fallback]
    with pytest.raises(TrackingError, match=f"is a variant of run {fallback[:8]}, pruned-fp32 on bench"):
        tracker.find_run(variant)
    with pytest.raises(TrackingError, match="no run '0000"):
        tracker.find_run("0" * 32)


def test_tracker_errors_say_where_and_what_next(tracker: Tracker) -> None:
    run_id = tracker.start_run("digits")
    with pytest.raises(TrackingError, match=r"could not read run 0000.*MLFLOW_TRACKING_URI") as caught:
        tracker.run("0000")
    assert caught.value.exit_code == 6
    assert caught.value.__cause__ is not None
    with pytest.raises(TrackingError, match=r"fetch missing\.json"):
        tracker.load_json(run_id, "missing.json")
    tracker.log_text(run_id, "torn.json", '{"a": ')
    with pytest.raises(TrackingError, match=r"torn\.json of run .* is not JSON"):
        tracker.load_json(run_id, "torn.json")


@pytest.mark.parametrize("uri", ["gopher://nowhere", "sqlite:////proc/no/such/place/mlflow.db"])
def test_tracker_reports_an_address_that_cannot_be_opened(uri: str) -> None:
    with pytest.raises(TrackingError, match="could not"):
        Tracker(uri).pipeline_runs()


def test_construction_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JETWAY_HOME", str(tmp_path / "home"))
    Tracker()
    assert not (tmp_path / "home").exists()


def test_tracking_uri_of_the_user_wins(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mine.db'}")
    assert Tracker().uri.endswith("mine.db")
    assert not Tracker().embedded
    assert Tracker(f"sqlite:///{home / 'mlflow.db'}").embedded


def test_passwords_stay_out_of_messages() -> None:
    assert without_password("https://me:secret@mlflow.example:80/x") == "https://mlflow.example:80/x"
    assert without_password("sqlite:////tmp/mlflow.db") == "sqlite:////tmp/mlflow.db"
    assert without_password("postgresql://db/x?user=me&password=secret") == "postgresql://db/x"


def test_find_run_keeps_a_password_in_the_address_to_itself(home: Path) -> None:
    tracker = Tracker(f"sqlite:///{home / 'mlflow.db'}?password=secret")
    with pytest.raises(TrackingError, match="no run 'abc'") as caught:
        tracker.find_run("abc")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("what", ["{uri}", "postgresql://me:secret@db/x", "('db?password=secret',)"])
def test_the_text_of_an_error_keeps_no_password(what: str) -> None:
    uri = "postgresql://me:secret@db/x?password=secret"
    with pytest.raises(TrackingError, match="could not open: refused by") as caught, translated(uri, "open"):
        raise OSError(f"refused by {what.format(uri=uri)}")
    assert "secret" not in str(caught.value)


def test_tracker_finds_the_newest_finished_run_with_a_file(tracker: Tracker) -> None:
    with pytest.raises(TrackingError, match=r"has result\.json yet"):
        tracker.newest_run_with("result.json")
    good, failed, _running = (tracker.start_run("digits", run_name=name) for name in ("a", "b", "c"))
    tracker.log_json(good, "result.json", {})
    tracker.finish(good, "FINISHED")
    tracker.finish(failed, "FAILED")
    assert tracker.newest_run_with("result.json").run_id == good


def _leave_a_run(uri: str) -> None:
    parent = Tracker(uri).start_run("digits")
    Tracker(uri).start_child(parent, "baseline-fp32")
    os._exit(9)


def test_reap_marks_runs_of_dead_processes_killed_and_no_others(tracker: Tracker) -> None:
    mine = tracker.start_run("digits")
    rebooted = tracker.start_run("digits", tags={BOOT_TAG: "an earlier boot"})
    tracker.set_tags(rebooted, {BOOT_TAG: "an earlier boot"})
    process = multiprocessing.get_context("spawn").Process(target=_leave_a_run, args=(tracker.uri,))
    process.start()
    process.join()
    reaped = tracker.reap()
    statuses = {run.run_id: run.status for run in tracker.search("")}
    assert statuses.pop(mine) == "RUNNING"
    assert set(statuses.values()) == {"KILLED"}
    assert set(reaped) == set(statuses)
    assert len(reaped) == 3
    assert tracker.reap() == []


def test_process_alive_tells_a_reused_pid() -> None:
    assert environment.process_alive(environment.process_id())
    assert not environment.process_alive(f"{os.getpid()}:1")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert not environment.process_alive(f"{gone.pid}:1")
    assert not environment.process_alive("")


def test_git_commit_names_the_commit_and_says_when_files_differ(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True)
        return done.stdout.strip()

    assert environment.git_commit(tmp_path) == ""
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    assert environment.git_commit(tmp_path) == git("rev-parse", "HEAD") != ""
    (tmp_path / "file").write_text("2")
    assert environment.git_commit(tmp_path).endswith("+changes")


def test_describe_environment_is_json_with_versions() -> None:
    described = json.loads(json.dumps(environment.describe_environment()))
    assert {"torch", "mlflow", "prefect"} <= set(described["packages"])
    assert described["python"].startswith("3.")


def test_flat_params_names_every_field_by_its_section() -> None:
    params = flat_params(
        QatConfig.model_validate({"distillation": {"weight": 0.25}, "keep_float": ["a", "b"]})
    )
    assert params["distillation.weight"] == 0.25
    assert params["keep_float"] == "a, b"
    assert params["epochs"] == 3


def test_short_text_leaves_short_text_alone() -> None:
    assert short_text("x" * PARAM_CHARACTERS) == "x" * PARAM_CHARACTERS


def make_index(tracker: Tracker, root: Path, run_id: str | None = None) -> MlflowStageIndex:
    return MlflowStageIndex(tracker, Store(root), run_id=run_id)


def test_index_brings_files_to_another_home(tracker: Tracker, tmp_path: Path) -> None:
    ours, theirs = Store(tmp_path / "ours"), Store(tmp_path / "theirs")
    output = add_output(ours)
    MlflowStageIndex(tracker, ours).record(KEY, "prune", output, 1.5)
    found = MlflowStageIndex(Tracker(tracker.uri), theirs).find(KEY)
    assert found is not None
    assert found.handles() == output.handles()
    assert found.metrics == output.metrics
    assert theirs.open(found.handle).read_bytes() == b"weights"
    assert MlflowStageIndex(tracker, theirs).find(json_sha256("another key")) is None


def test_index_finds_again_within_50_ms(tracker: Tracker, tmp_path: Path) -> None:
    index = make_index(tracker, tmp_path)
    index.record(KEY, "prune", add_output(Store(tmp_path)), 1.5)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        assert index.find(KEY) is not None
        seconds.append(time.perf_counter() - started)
    assert min(seconds) <= 0.050


def test_index_heals_a_store_whose_file_is_corrupt(tracker: Tracker, tmp_path: Path) -> None:
    ours, theirs = Store(tmp_path / "ours"), Store(tmp_path / "theirs")
    output = add_output(ours)
    MlflowStageIndex(tracker, ours).record(KEY, "prune", output, 1.5)
    broken = theirs.path_of(output.handle)
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"rubbish")
    assert MlflowStageIndex(tracker, theirs).find(KEY) is not None
    assert broken.read_bytes() == b"weights"


@pytest.mark.parametrize("damage", ["corrupt", "missing", "output"])
def test_index_finds_nothing_when_the_artifact_is_bad(
    tracker: Tracker, tmp_path: Path, home: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours = Store(tmp_path / "ours")
    output = add_output(ours)
    MlflowStageIndex(tracker, ours).record(KEY, "prune", output, 1.5)
    name = "output.json" if damage == "output" else "*.safetensors"
    (artifact,) = (home / "mlartifacts").rglob(name)
    artifact.unlink()
    if damage != "missing":
        artifact.write_text('{"handle": 1}')
    with caplog.at_level(logging.WARNING, "jetway"):
        assert MlflowStageIndex(tracker, Store(tmp_path / "theirs")).find(KEY) is None
    assert "prune: a recorded result cannot be reused" in caplog.text
    MlflowStageIndex(tracker, ours).record(KEY, "prune", output, 1.5)
    assert MlflowStageIndex(tracker, Store(tmp_path / "theirs")).find(KEY) is not None


def test_index_counts_an_entry_only_when_it_is_finished(tracker: Tracker, tmp_path: Path) -> None:
    run_id = tracker.start_stage(
        "jetway-stages", "prune", {"jetway.stage": "prune", "jetway.stage_key": KEY}, unless=""
    )
    assert make_index(tracker, tmp_path).find(KEY) is None
    tracker.finish(run_id, "KILLED")
    assert make_index(tracker, tmp_path).find(KEY) is None


def test_index_notes_the_stages_a_run_used(tracker: Tracker, tmp_path: Path) -> None:
    run_id = tracker.start_run("digits")
    assert used_keys(tracker, run_id) == set()
    index = make_index(tracker, tmp_path, run_id)
    other = json_sha256("other")
    index.record(KEY, "prune", add_output(Store(tmp_path)), 1.5)
    index.record(other, "finetune", add_output(Store(tmp_path), b"more"), 1.5)
    index.find(KEY)
    assert used_keys(tracker, run_id) == {KEY, other}
    stages: list[dict[str, Any]] = tracker.load_json(run_id, "stages.json")["stages"]
    assert [(stage["stage"], stage["reused"]) for stage in stages] == [("prune", True), ("finetune", False)]


def test_index_keeps_the_kind_of_each_file(tracker: Tracker, tmp_path: Path) -> None:
    make_index(tracker, tmp_path / "a").record(KEY, "prune", add_output(Store(tmp_path / "a")), 1.0)
    found = make_index(tracker, tmp_path / "b").find(KEY)
    assert found is not None
    assert isinstance(found.handle, Checkpoint)
    assert isinstance(found.files["notes.json"], Report)


def test_a_spool_of_a_dead_process_is_read_up_to_its_torn_end(home: Path, tmp_path: Path) -> None:
    spool = Spool("http://mlflow")
    (tmp_path / "table").write_text("rows")
    spool.append(Write(run_id="1", metrics=(Point(name="top1", value=math.nan, timestamp_ms=1, step=0),)))
    spool.append(Write(run_id="2", files={"table.md": tmp_path / "table"}))
    assert list(left_spools()) == [], "its process lives"
    folder = spool.folder
    assert spool._file is not None
    spool._file.close()
    with (folder / "writes.jsonl").open("ab") as file:
        file.write(b'{"run_id": "3", "metr')
    (left,) = left_spools()
    sent: list[Line] = []
    left.replay(lambda line: not sent.append(line))  # type: ignore[func-returns-value]
    first, second = sent
    assert isinstance(first, Write)
    assert isinstance(second, Write)
    assert math.isnan(first.metrics[0].value)
    assert [second.run_id, *second.files] == ["2", "table.md"]
    assert not folder.exists()


def test_spools_that_another_process_hands_over_meanwhile_are_passed_by(home: Path) -> None:
    for number in range(3):
        spool = Spool("http://mlflow")
        spool.append(Write(run_id=str(number)))
        assert spool._file is not None
        spool._file.close()
    found = left_spools()
    first = next(found)
    for folder in set((home / "spool").iterdir()) - {first.folder}:
        shutil.rmtree(folder)
    assert list(found) == []


def test_a_spool_of_another_version_is_left_where_it_is(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = home / "spool" / "old"
    folder.mkdir(parents=True)
    (folder / "writes.jsonl").write_text('{"uri": "http://mlflow", "of": "the future"}\n')
    assert list(left_spools()) == []
    assert "another version of Jetway" in caplog.text
    assert (folder / "writes.jsonl").exists()


def test_a_handover_goes_on_where_it_broke_off(home: Path) -> None:
    spool = Spool("http://mlflow")
    for number in range(3):
        spool.append(Write(run_id=str(number), name="x"))
    sent: list[str] = []

    def send(line: Line) -> bool:
        assert isinstance(line, Write)
        if line.run_id == "1" and len(sent) == 1:
            sent.append("broken")
            raise TrackingUnreachableError("away")
        sent.append(line.run_id)
        return True

    with pytest.raises(TrackingUnreachableError):
        spool.replay(send)
    assert spool.waiting == 2
    folder = spool.folder
    spool.replay(send)
    assert sent == ["0", "broken", "1", "2"]
    assert spool.waiting == 0
    assert not folder.exists()
