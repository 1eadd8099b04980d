"""Runs that are killed or interrupted: what the target is left with, and how the next run goes on."""

import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from jetway.tasks.on_device import lease
from jetway.tasks.tracking.tracker import Tracker

pytestmark = [pytest.mark.serial, pytest.mark.filterwarnings("default")]

QUICK_BENCHMARK = {"min_duration_s": 0.5, "min_queries": 100, "max_extensions": 0}
LONG_BENCHMARK = ("--set", "benchmark.min_duration_s=5")
STAGES = ["finetune", "build", "benchmark"]
HOST_STAGES = ["load", "analyze", "prune", "finetune", "ptq", "qat"]
GRACE_S = 5
SLACK_S = 4


@pytest.fixture
def long_project(project):
    """The README's project, with stages long enough to be caught, on a target that gives up orphans soon."""
    recipe = yaml.safe_load((project / "my_recipe.yaml").read_text())
    recipe |= {"finetune": {"epochs": 6}, "targets": ["quick"], "name": project.parent.name[:60]}
    recipe["train"] = {"epochs": 1, "learning_rate": 3e-3}
    recipe["benchmark"] = QUICK_BENCHMARK
    (project / "my_recipe.yaml").write_text(yaml.safe_dump(recipe))
    (project / "targets").mkdir()
    target = {"name": "quick", "kind": "loopback", "orphan_grace_s": GRACE_S}
    (project / "targets/quick.yaml").write_text(yaml.safe_dump(target))
    return project


def wait_for_line(process, start):
    """Reads stderr until a line begins with the text; goes on draining it in the background."""
    for line in process.stderr:
        if line.strip().startswith(start):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return
    pytest.fail(f"the run ended before it came to {start!r}")


def wait_for_epochs(home, count):
    """Until the resume file of a training tells of so many finished epochs."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in (home / "work").glob("*/training-*.pt"):
            if len(torch.load(path, weights_only=True)["history"]) > count:
                return
        time.sleep(0.05)
    pytest.fail("no epoch was finished in time")


def running_on_target(home):
    """Command lines of what runs in a target's folder below this home."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"{home}/targets/" in command and "loopback_server" not in command:
            found.append(command.replace("\0", " "))
    return found


def wait_until_nothing_runs(home, limit_s):
    deadline = time.monotonic() + limit_s
    while running := running_on_target(home):
        assert time.monotonic() < deadline, running
        time.sleep(0.2)


def lease_is_free():
    with lease.held("cpu", job="test", timeout_s=10, wait=lambda seconds, holder: None):
        return True


def newest_run(home):
    return Tracker(f"sqlite:///{home / 'mlflow.db'}").find_run("latest")


@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_leaves_nothing_and_the_next_one_goes_on(
    stage, long_project, start_jetway, jetway_here, cli_home
):
    seed = (
        "--set",
        f"seed={STAGES.index(stage) + 1}",
    )  # results of its own, so that only this run can have made them
    killed = start_jetway("run", "my_recipe.yaml", *seed, *LONG_BENCHMARK, cwd=long_project)
    wait_for_line(killed, stage)
    if stage == "finetune":
        wait_for_epochs(cli_home, 2)
    killed.send_signal(signal.SIGKILL)
    wait_until_nothing_runs(cli_home, GRACE_S + SLACK_S)
    assert lease_is_free()

    resumed = jetway_here("run", "my_recipe.yaml", "--json", *seed, cwd=long_project)
    assert resumed.json["status"] == "FINISHED", resumed.stderr
    redone = [name for name in resumed.stages(cached=False) if name in HOST_STAGES]
    assert redone == (["finetune", "ptq", "qat"] if stage == "finetune" else [])
    if stage == "finetune":
        first_line = next(line for line in resumed.stderr.splitlines() if line.strip().startswith("finetune"))
        assert "epoch 1/" not in first_line, "fine-tuning started over"
    statuses = [run.status for run in Tracker(f"sqlite:///{cli_home / 'mlflow.db'}").pipeline_runs(limit=2)]
    assert statuses == ["FINISHED", "KILLED"]


def test_ctrl_c_ends_the_job_and_says_so(long_project, start_jetway, cli_home):
    process = start_jetway("run", "my_recipe.yaml", *LONG_BENCHMARK, cwd=long_project)
    wait_for_line(process, "benchmark")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert running_on_target(cli_home) == []
    assert lease_is_free()
    assert newest_run(cli_home).status == "KILLED"
