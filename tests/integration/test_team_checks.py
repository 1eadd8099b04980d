"""What ``test_team`` asserts turns red when the lease, the queue or the replay behind it is taken away."""

import subprocess
import sys
from pathlib import Path

import pytest
from doubles.record import assert_no_overlap, assert_recorded_once, holds

from jetway.flows.record import RESULT_PATH
from jetway.tasks.on_device import lease
from jetway.tasks.tracking.spool import Spool
from jetway.tasks.tracking.tracker import Tracker

pytestmark = pytest.mark.team

JOB = """
import sys, time
from jetway.tasks.on_device import lease
name, folder, without = sys.argv[1:]
if without == "lease":
    lease._acquire = lambda path, *_: lease._open_shared(path)
print("ready", flush=True)
sys.stdin.readline()
with lease.held("cpu", name, 0 if without == "queue" else 30, lambda seconds, holder: time.sleep(seconds), folder):
    time.sleep(0.5)
"""


def run_jobs(folder: Path, without: str) -> list[int]:
    """Exit codes of four jobs that want one accelerator at the same moment."""
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, f"job-{number}", str(folder), without],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for number in range(4)
    ]
    assert all(job.stdout and job.stdout.readline() == b"ready\n" for job in jobs)
    for job in jobs:
        assert job.stdin
        job.stdin.write(b"go\n")
        job.stdin.flush()
    for job in jobs:
        job.communicate(timeout=60)
    return [job.returncode for job in jobs]


@pytest.mark.parametrize("without", ["nothing", "lease", "queue"])
def test_jobs_on_one_accelerator_overlap_without_the_lease_and_fail_without_the_queue(
    without: str, tmp_path: Path
) -> None:
    codes = run_jobs(tmp_path, without)
    held = holds(Path(lease.lease_path("cpu", str(tmp_path)) + ".log"), 0)
    assert (codes == [0] * 4) is (without != "queue")
    assert len(held) == codes.count(0)
    if without == "lease":
        with pytest.raises(AssertionError, match=r"began .* s before job-\d had ended"):
            assert_no_overlap(held)
    else:
        assert_no_overlap(held)


def write_run(tracker: Tracker) -> str:
    """A run with one row, as a flow leaves it."""
    run_id = tracker.start_run("digits")
    metrics = {"latency_ms_p50": 1.5, "top1": 0.97}
    child = tracker.start_child(run_id, "try", {}, {"variant": "baseline-fp32", "target": "board-1"})
    tracker.log_metrics(child, metrics)
    tracker.finish(child, "FINISHED")
    rows = [{"variant": "baseline-fp32", "target": "board-1", "metrics": {**metrics, "power_w_mean": None}}]
    tracker.log_json(run_id, RESULT_PATH, {"rows": rows})
    tracker.finish(run_id, "FINISHED")
    return run_id


def test_a_run_is_recorded_once() -> None:
    tracker = Tracker()
    assert_recorded_once(tracker, write_run(tracker))


@pytest.mark.parametrize("damage", ["lost child", "doubled child", "doubled metric", "lost metric"])
def test_what_is_lost_or_doubled_is_seen(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker()
    run_id = write_run(tracker)
    (child,) = tracker.children(run_id)
    if damage == "lost child":
        tracker.delete_run(child.run_id)
    elif damage == "doubled child":
        tracker.start_child(run_id, "again", {}, {"variant": "baseline-fp32", "target": "board-1"})
    elif damage == "doubled metric":
        tracker.log_metrics(child.run_id, {"top1": 0.97}, step=1)
    else:
        tracker.delete_run(child.run_id)
        other = tracker.start_child(run_id, "without", {}, {"variant": "baseline-fp32", "target": "board-1"})
        tracker.log_metrics(other, {"top1": 0.97})
        tracker.finish(other, "FINISHED")
    with pytest.raises(AssertionError):
        assert_recorded_once(tracker, run_id)


@pytest.mark.parametrize("replayed", [True, False])
def test_without_a_replay_a_run_is_not_whole(replayed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker()
    monkeypatch.setattr(Tracker, "_must_spool", lambda self: True)
    if not replayed:
        monkeypatch.setattr(Spool, "append", lambda self, line: None)
    run_id = write_run(tracker)
    monkeypatch.undo()
    assert tracker.replay(wait_s=0)
    if replayed:
        assert_recorded_once(Tracker(tracker.uri), run_id)
    else:
        with pytest.raises(AssertionError):
            assert_recorded_once(Tracker(tracker.uri), run_id)
