"""What must be true of a run's record whatever was killed meanwhile, and of the leases' log."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from jetway.flows.record import RESULT_PATH
from jetway.tasks.tracking.tracker import Tracker


def assert_recorded_once(tracker: Tracker, run_id: str) -> None:
    """Every row of the run's result is one finished child run, and each of its metrics is there once."""
    run = tracker.run(run_id)
    assert run.status == "FINISHED", run.tags.get("error")
    rows = {(row["variant"], row["target"]): row for row in tracker.load_json(run_id, RESULT_PATH)["rows"]}
    children = tracker.children(run_id)
    found = [(child.tags["variant"], child.tags["target"]) for child in children]
    assert sorted(found) == sorted(rows), "a child run is lost or doubled"
    for child, key in zip(children, found, strict=True):
        assert child.status == "FINISHED"
        measured = {name: value for name, value in rows[key]["metrics"].items() if value is not None}
        assert child.metrics == measured, f"metrics of {key}"
        for name, value in measured.items():
            points = tracker._mlflow.client.get_metric_history(child.run_id, name)
            assert [point.value for point in points] == [value], f"{name} of {key}"


def holds(log: Path, since_s: float) -> list[tuple[float, float, str]]:
    """When the lease was held, by its log, from a moment on: seconds since boot, and the job."""
    open_jobs: dict[tuple[str, int], float] = {}
    found = []
    for line in log.read_text().splitlines():
        event = json.loads(line)
        job = (event["job"], event["pid"])
        if event["event"] == "acquire" and event["monotonic_s"] >= since_s:
            open_jobs[job] = event["monotonic_s"]
        elif event["event"] == "release" and job in open_jobs:
            found.append((open_jobs.pop(job), event["monotonic_s"], event["job"]))
    return sorted(found)


def assert_no_overlap(held: Iterable[tuple[float, float, str]]) -> None:
    ended_s, before = 0.0, ""
    for began_s, until_s, job in held:
        assert began_s >= ended_s, f"{job} began {ended_s - began_s:.3f} s before {before} had ended"
        ended_s, before = until_s, job
