"""Runs on several targets, each with its own fate: good ones are measured whatever becomes of the others."""

import subprocess
import sys

import pytest
import yaml

from jetway.tasks.tracking.tracker import Tracker

pytestmark = [pytest.mark.team, pytest.mark.filterwarnings("default")]

RECIPE = {
    "variants": ["baseline-fp32"],
    "gates": [],
    "train": {"epochs": 1},
    "benchmark": {"min_duration_s": 0.3, "min_queries": 50},
}


@pytest.fixture
def fleet(project):
    """The README's project with a short recipe; ``fleet(name, key=value)`` adds a target, this machine by default."""
    recipe = yaml.safe_load((project / "my_recipe.yaml").read_text())
    (project / "my_recipe.yaml").write_text(yaml.safe_dump(recipe | RECIPE))
    (project / "targets").mkdir()

    def add(name, **keys):
        target = {"name": name, "kind": "loopback"} | keys
        (project / f"targets/{name}.yaml").write_text(yaml.safe_dump(target))
        return f"--target={name}"

    return add


def test_bad_boards_do_not_hide_good_ones(fleet, project, mount_disk, jetway_here, cli_home):
    """One does not answer, and the disk of another is full once the recipe has trained."""
    small = {"work_dir": f"{mount_disk('300k')}/jetway", "min_free_disk_mib": 0}
    targets = [fleet("full", **small), fleet("good"), fleet("dead", kind="ssh", port=9)]
    run = jetway_here("run", "my_recipe.yaml", *targets, "--json", cwd=project)
    told = run.json
    assert (run.exit_code, told["status"], told["exit_code"]) == (3, "FAILED", 3)
    assert [row["target"] for row in told["variants"]] == ["good"]
    states = {one["name"]: (one["status"], one["exit_code"]) for one in told["targets"]}
    assert states.pop("good") in [("FINISHED", 0), ("FINISHED", 5)]
    assert states == {"full": ("FAILED", 3), "dead": ("FAILED", 3)}
    assert "2 of 3 targets" in told["error"]
    assert all(word in told["error"] for word in ("127.0.0.1:9", "full: ", "are free"))
    assert run.stderr.count("2 of 3 targets") == 1
    assert "warning: dead is left out" in run.stderr

    tracker = Tracker(f"sqlite:///{cli_home / 'mlflow.db'}")
    record = tracker.run(told["run_id"])
    assert (record.status, record.tags["failed_targets"]) == ("FAILED", "full, dead")
    assert "127.0.0.1:9" in record.tags["mlflow.note.content"]
    assert [child.tags["target"] for child in tracker.children(record.run_id)] == ["good"]
    assert "targets/good/package.zip" in tracker.files(record.run_id)
    assert "2 targets gave no result" in (tracker.local_folder(record.run_id) / "report.html").read_text()
    shown = jetway_here("show", "latest", cwd=project)
    assert "NO RESULT (exit code 3): dead: cannot reach" in shown.stdout


def test_a_fleet_without_one_good_board_trains_nothing(fleet, project, jetway_here):
    targets = [fleet(name, kind="ssh", port=9) for name in ("dead", "gone")]
    run = jetway_here("run", "my_recipe.yaml", *targets, "--json", cwd=project)
    assert run.exit_code == 3
    assert "2 of 2 targets gave no result" in run.json["error"]
    assert [stage["name"] for stage in run.json["stages"]] == []


HOLDER = """
import sys, time
from jetway.tasks.on_device import lease
with lease.held("cpu", "job17", 60, lambda *_: time.sleep(0.1), owner="ben@lab, process 7"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Holds this machine's lease until its stdin closes."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    yield holder
    holder.communicate()


def test_a_busy_target_fails_at_once_and_names_its_holder(fleet, project, jetway_here, hold):
    run = jetway_here("run", "my_recipe.yaml", fleet("board"), "--busy-timeout-s", "0", "--json", cwd=project)
    assert run.exit_code == 3
    assert "cpu is held by job job17 of ben@lab, process 7" in run.json["error"]
    assert [stage["name"] for stage in run.json["stages"]] == ["preflight board"]


def test_a_fleet_leaves_out_a_board_in_quarantine(fleet, project, jetway_here, cli_home):
    """Loudly, and without counting it as a failure of today."""
    tracker = Tracker(f"sqlite:///{cli_home / 'mlflow.db'}")
    for _ in range(3):
        tags = {"target": "shaky", "validity": "INVALID"}
        run_id = tracker.start_run("tiny")
        tracker.finish(tracker.start_child(run_id, "baseline-fp32", tags=tags), "FINISHED")
        tracker.finish(run_id, "FINISHED")
    targets = [fleet("shaky"), fleet("a"), fleet("b")]
    run = jetway_here("run", "my_recipe.yaml", *targets, "--json", cwd=project)
    assert (run.json["status"], run.exit_code in (0, 5)) == ("FINISHED", True)
    assert [one["status"] for one in run.json["targets"]] == ["FINISHED", "FINISHED", "QUARANTINED"]
    assert "LEFT OUT, in quarantine: shaky: its newest 3 measurements are INVALID" in run.stderr
    assert tracker.run(run.json["run_id"]).tags["quarantined_targets"] == "shaky"
