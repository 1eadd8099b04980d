"""What a run measures while MLflow's server is away: on the disk at once, and in MLflow exactly once later.

All of it with a server on sqlite and with one on PostgreSQL.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from doubles.postgres import running_postgres
from doubles.servers import MlflowServer

from jetway.tasks.artifacts import Checkpoint, StageOutput, json_sha256
from jetway.tasks.errors import TrackingUnreachableError
from jetway.tasks.store import Store
from jetway.tasks.tracking.index import MlflowStageIndex
from jetway.tasks.tracking.tracker import Tracker

pytestmark = pytest.mark.team

WRITES_AND_DIES = """
import os, sys
from jetway.tasks.tracking.tracker import Tracker
tracker = Tracker(run_patience_s=1)
run_id = tracker.start_run("digits", run_name="of a dead process")
print(run_id, flush=True)
sys.stdin.readline()
tracker.log_metrics(run_id, {"top1": 0.5})
child = tracker.start_child(run_id, "baseline-fp32", {"opset": 17})
tracker.log_metrics(child, {"top1": 0.5})
tracker.finish(child, "FINISHED")
os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowServer]:
    with ExitStack() as stack:
        postgres = stack.enter_context(running_postgres()) if request.param == "postgresql" else None
        server = MlflowServer(tmp_path_factory.mktemp("mlflow"), postgres.url if postgres else None)
        stack.callback(server.kill)
        server.start()
        yield server


@pytest.fixture(autouse=True)
def _server_runs(server: MlflowServer) -> None:
    if server.process is None:
        server.start()


def spool_folders() -> list[Path]:
    return list((Path(os.environ["JETWAY_HOME"]) / "spool").glob("*"))


def history(tracker: Tracker, run_id: str, metric: str) -> list[tuple[float, int, int]]:
    points = tracker._mlflow.client.get_metric_history(run_id, metric)
    return sorted((point.value, point.timestamp, point.step) for point in points)


def measure(tracker: Tracker, run_id: str, store: Store) -> str:
    """Everything that a run writes."""
    with store.scratch() as folder:
        (folder / "weights").write_bytes(b"weights" * 1000)
        handle = store.add(Checkpoint, folder / "weights")
    child = tracker.start_child(run_id, "baseline-fp32", {"opset": 17}, {"variant": "baseline-fp32"})
    tracker.log_series(child, [(step, {"loss": step / 10}) for step in range(900)])
    tracker.log_metrics(child, {"top1": 0.97, "never": float("inf")})
    tracker.log_files(child, {"model/weights.safetensors": (handle, store.open(handle))})
    store.path_of(handle).unlink()
    tracker.finish(child, "FINISHED")
    tracker.describe(run_id, "first")
    tracker.describe(run_id, "second")
    tracker.log_json(run_id, "result.json", {"rows": 1})
    tracker.rename(run_id, "renamed")
    tracker.finish(run_id, "FINISHED")
    return child


def assert_all_is_there_once(tracker: Tracker, run_id: str) -> None:
    run, (child,) = tracker.run(run_id), tracker.children(run_id)
    assert (run.status, run.name, run.tags["mlflow.note.content"]) == ("FINISHED", "renamed", "second")
    assert tracker.load_json(run_id, "result.json") == {"rows": 1}
    assert (child.status, child.params, child.tags["variant"]) == (
        "FINISHED",
        {"opset": "17"},
        "baseline-fp32",
    )
    points = history(tracker, child.run_id, "loss")
    assert [(value, step) for value, _, step in points] == [(step / 10, step) for step in range(900)]
    assert len(history(tracker, child.run_id, "top1")) == 1
    assert list(tracker.files(child.run_id)) == ["model/weights.safetensors"]


def test_what_is_written_while_mlflow_is_away_is_there_once_when_it_is_back(
    server: MlflowServer, tmp_path: Path
) -> None:
    tracker = Tracker(server.url, run_patience_s=1)
    run_id = tracker.start_run("digits", run_name="first")
    server.kill()
    began = time.monotonic()
    child = measure(tracker, run_id, Store(tmp_path / "store"))
    assert 1 <= time.monotonic() - began < 10, "patience is spent once, not for each write"
    assert not tracker.replay(wait_s=0)
    lines = leave_spool()
    server.start()
    assert tracker.replay()
    assert_all_is_there_once(Tracker(server.url), run_id)
    tracker.set_tags(child, {"late": "by the token that stood for the run"})
    assert Tracker(server.url).children(run_id)[0].tags["late"]
    ended_ms = tracker._mlflow.client.get_run(run_id).info.end_time

    assert Tracker(server.url).replay_left() == lines
    assert_all_is_there_once(Tracker(server.url), run_id)
    assert Tracker(server.url)._mlflow.client.get_run(run_id).info.end_time == ended_ms
    assert spool_folders() == []


def leave_spool() -> int:
    """Leaves what a process does that dies in the middle of a handover, or just before it would remove the spool."""
    (folder,) = spool_folders()
    left = folder.with_name("left")
    shutil.copytree(folder, left)
    text = (folder / "writes.jsonl").read_text().replace(str(folder), str(left))
    (left / "writes.jsonl").write_text(text)
    return len(text.splitlines()) - 1


def test_a_handover_may_break_off_after_any_request_and_begins_anew(
    server: MlflowServer, tmp_path: Path
) -> None:
    tracker = Tracker(server.url, run_patience_s=0)
    run_id = tracker.start_run("digits", run_name="first")
    server.kill()
    measure(tracker, run_id, Store(tmp_path / "store"))
    lines = leave_spool()
    server.start()
    breaks = 0
    while hand_over(server, requests_answered=breaks) is None:
        breaks += 1
        if breaks == lines:
            server.kill()
            assert hand_over(server) is None
            server.start()
    assert breaks > lines, "each line is at least one request"
    assert_all_is_there_once(Tracker(server.url), run_id)
    assert tracker.replay()
    assert_all_is_there_once(Tracker(server.url), run_id)
    assert spool_folders() == []


def hand_over(server: MlflowServer, requests_answered: int = sys.maxsize) -> int | None:
    """Lines that were handed over; None where it broke off, as the answer to a later request is lost."""
    with losing_an_answer(after=requests_answered):
        try:
            return Tracker(server.url).replay_left()
        except TrackingUnreachableError:
            return None


@contextmanager
def losing_an_answer(*, after: int) -> Iterator[None]:
    """The request reaches the server, its answer nobody."""
    send, sent = requests.Session.send, itertools.count()

    def send_and_lose(*arguments: Any, **options: Any) -> requests.Response:
        answer = send(*arguments, **options)
        if next(sent) == after:
            raise requests.ConnectionError("the answer is lost")
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests.Session, "send", send_and_lose)
        yield


def test_a_restart_within_the_patience_costs_nothing_but_time(server: MlflowServer, tmp_path: Path) -> None:
    tracker = Tracker(server.url)
    run_id = tracker.start_run("digits")
    server.kill()
    server.start(wait=False)
    measure(tracker, run_id, Store(tmp_path / "store"))
    assert spool_folders() == []
    assert_all_is_there_once(tracker, run_id)


def test_a_stage_that_ended_meanwhile_is_recorded_later_and_not_twice(
    server: MlflowServer, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    with store.scratch() as folder:
        (folder / "weights").write_bytes(b"weights")
        output = StageOutput(handle=store.add(Checkpoint, folder / "weights"))
    known, new = json_sha256(f"known to {tmp_path}"), json_sha256(f"new in {tmp_path}")
    tracker = Tracker(server.url, run_patience_s=0)
    run_id = tracker.start_run("digits")
    index = MlflowStageIndex(tracker, store, run_id=run_id)
    index.record(known, "prune", output, 1.0)
    server.kill()
    assert index.find(known) is None
    index.record(known, "prune", output, 1.0)
    index.record(new, "finetune", output, 1.0)
    server.start()
    assert tracker.replay()
    entries = MlflowStageIndex(Tracker(server.url), store).entries()
    keys = [entry.tags["jetway.stage_key"] for entry in entries]
    assert (keys.count(known), keys.count(new)) == (1, 1)
    assert {entry.status for entry in entries} == {"FINISHED"}
    assert MlflowStageIndex(Tracker(server.url), Store(tmp_path / "theirs")).find(new) == output


def test_the_next_run_hands_over_what_a_killed_one_left(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = os.environ | {"MLFLOW_TRACKING_URI": server.url}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITES_AND_DIES],
        env=environment, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    run_id = process.stdout.readline().strip()
    server.kill()
    process.communicate("go\n", timeout=60)
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    tracker = Tracker()
    assert tracker.children(run_id) == []
    assert tracker.reap() == [run_id]
    (child,) = tracker.children(run_id)
    assert (tracker.run(run_id).status, child.status) == ("KILLED", "FINISHED")
    assert (tracker.run(run_id).metrics, child.metrics) == ({"top1": 0.5}, {"top1": 0.5})
    assert spool_folders() == []


def test_a_run_cannot_begin_without_mlflow_and_is_not_made_twice_by_a_retry(server: MlflowServer) -> None:
    server.kill()
    with pytest.raises(TrackingUnreachableError, match="could not start a run of digits"):
        Tracker(server.url, run_patience_s=1).start_run("digits")
    assert spool_folders() == []
    server.start()
    tracker = Tracker(server.url)
    make = tracker._mlflow.make_run

    def answer_is_lost(new: Any) -> str:
        make(new)
        raise requests.ConnectionError("the server died before it answered")

    tracker._mlflow.make_run = answer_is_lost  # type: ignore[method-assign]
    before = {run.run_id for run in tracker.pipeline_runs()}
    run_id = tracker.start_run("digits")
    assert {run.run_id for run in tracker.pipeline_runs()} - before == {run_id}


def test_what_mlflow_refuses_does_not_stop_the_rest_and_stays_on_the_disk(server: MlflowServer) -> None:
    tracker = Tracker(server.url, run_patience_s=0)
    run_id, gone = tracker.start_run("digits"), tracker.start_run("digits")
    server.kill()
    tracker.log_metrics(gone, {"top1": 0.5})
    tracker.log_metrics(run_id, {"top1": 0.6})
    server.start()
    Tracker(server.url).delete_run(gone)
    assert tracker.replay()
    assert tracker.run(run_id).metrics == {"top1": 0.6}
    (folder,) = spool_folders()
    lines = (folder / "refused.jsonl").read_text().splitlines()
    assert gone in {json.loads(line).get("run_id") for line in lines}
    assert Tracker(server.url).replay_left() == 0
