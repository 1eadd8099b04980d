"""Quarantine, from the validity of a target's newest sessions in MLflow."""

import time
from statistics import median

import pytest
import yaml
from doubles.many_runs import add_runs

from jetway.configs.schema import Target
from jetway.flows.__main__ import main
from jetway.tasks.errors import MeasurementError
from jetway.tasks.quarantine import clear, newest_sessions, why_quarantined, without_quarantined
from jetway.tasks.tracking.tracker import Tracker

RUNS, LOOK_UP_LIMIT_S = 10_000, 0.2
BOARD, GOOD = Target(name="board"), Target(name="good")


@pytest.fixture
def tracker():
    return Tracker()


def measure(tracker, target, validity, *, status="FINISHED"):
    """A run of two variants on the target."""
    run_id = tracker.start_run("tiny")
    for variant in ("baseline-fp32", "pruned-fp32"):
        tags = {"variant": variant, "target": target.name, "validity": validity}
        tracker.finish(tracker.start_child(run_id, variant, tags=tags), status)
    tracker.finish(run_id, "FINISHED")
    return run_id


def test_quarantine_begins_with_the_third_in_a_row_and_ends_with_a_valid_one(tracker):
    measure(tracker, BOARD, "VALID")
    for _ in range(2):
        measure(tracker, BOARD, "INVALID")
    measure(tracker, GOOD, "INVALID")
    measure(tracker, BOARD, "VALID", status="FAILED")
    assert why_quarantined(tracker, BOARD) == ""
    third = measure(tracker, BOARD, "INVALID")
    assert f"newest 3 measurements are INVALID (runs {third[:8]}" in why_quarantined(tracker, BOARD)
    assert why_quarantined(tracker, GOOD) == ""
    # a worker with another home, and a target file of its own mind
    assert why_quarantined(Tracker(), BOARD)
    assert why_quarantined(tracker, BOARD.model_copy(update={"quarantine_after": 4})) == ""
    assert why_quarantined(tracker, BOARD.model_copy(update={"quarantine_after": 0})) == ""
    measure(tracker, BOARD, "VALID")
    assert why_quarantined(tracker, BOARD) == ""


def test_a_pardon_begins_the_count_anew(tracker):
    for _ in range(3):
        measure(tracker, BOARD, "INVALID")
    assert clear(tracker, "board") == 1
    assert why_quarantined(tracker, BOARD) == ""
    for _ in range(3):
        measure(tracker, BOARD, "INVALID")
    assert why_quarantined(tracker, BOARD)


def test_only_runs_on_several_targets_leave_it_out(tracker):
    for _ in range(3):
        measure(tracker, BOARD, "INVALID")
    assert without_quarantined(tracker, [BOARD]) == ([BOARD], [])
    fit, skipped = without_quarantined(tracker, [BOARD, GOOD])
    assert fit == [GOOD]
    assert [(one.name, one.status, one.exit_code) for one in skipped] == [("board", "QUARANTINED", 5)]
    for _ in range(3):
        measure(tracker, GOOD, "INVALID")
    with pytest.raises(MeasurementError, match=r"(?s)board: its newest 3.*good: its newest 3"):
        without_quarantined(tracker, [BOARD, GOOD])


def test_the_command_lists_and_clears(tracker, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "targets").mkdir()
    for target in (BOARD, GOOD):
        (tmp_path / f"targets/{target.name}.yaml").write_text(yaml.safe_dump({"name": target.name}))
    assert main(["quarantine", "--clear", "board"]) == 2
    for _ in range(3):
        measure(tracker, BOARD, "INVALID")
    assert main(["quarantine"]) == 0
    assert "board: its newest 3 measurements" in capsys.readouterr().out
    assert main(["quarantine", "--clear", "board"]) == 0
    assert main(["quarantine"]) == 0
    assert "None of board, good is in quarantine." in capsys.readouterr().out


def add_sessions(tracker, tmp_path, runs, variants, **figures):
    """Sessions of so many variants each on the board, all INVALID, past MLflow."""
    parent = tracker.start_run("tiny")
    experiment_id = tracker._mlflow.client.get_run(parent).info.experiment_id
    tags = {"jetway.kind": "variant", "target": BOARD.name, "validity": "INVALID"}
    sessions = [f"session {number // variants}" for number in range(runs)]
    told = [{**tags, "mlflow.parentRunId": session} for session in sessions]
    add_runs(tmp_path / "jetway-home" / "mlflow.db", experiment_id, told, **figures)


def test_a_session_of_many_variants_is_one(tracker, tmp_path):
    add_sessions(tracker, tmp_path, runs=140, variants=28)
    sessions = newest_sessions(tracker, BOARD.name, 3)
    assert [(one.run_id, len(one.children)) for one in sessions] == [(f"session {n}", 28) for n in (4, 3, 2)]
    assert len(newest_sessions(tracker, BOARD.name, 10)) == 5


@pytest.mark.serial
def test_why_a_target_is_in_quarantine_among_ten_thousand_runs(tracker, tmp_path):
    """Runs with as many params and metrics as those of the digits, by a tracker that has the database open."""
    add_sessions(tracker, tmp_path, RUNS, variants=4, metrics=20, params=80)
    taken_s = []
    for _ in range(3):
        started_s = time.perf_counter()
        assert "newest 3 measurements are INVALID" in why_quarantined(tracker, BOARD)
        taken_s.append(time.perf_counter() - started_s)
    assert median(taken_s) <= LOOK_UP_LIMIT_S
