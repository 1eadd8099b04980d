"""Runs that are killed or interrupted: what the target is left with, and how the next run goes on."""

import json
import signal
import time
import urllib.request

import pytest
import torch
import yaml

from jetway.configs.schema import Target
from jetway.flows.server import running_server
from jetway.tasks.on_device import lease
from jetway.tasks.tracking.tracker import Tracker

pytestmark = pytest.mark.filterwarnings("default")

HOST_STAGES = {"load", "analyze", "prune", "finetune", "export", "lower", "verify"}
QUICK_GRACE_S = 5
DEFAULT_GRACE_S = Target.model_fields["orphan_grace_s"].default
LONG_BENCHMARK = ("--set", "benchmark.min_duration_s=5")
TWO_VARIANTS = ("--set", "variants=[baseline-fp32, pruned-fp32]")


@pytest.fixture
def quick_project(project):
    """The README's project, cut to a small network and one variant, on a target that gives up orphans soon."""
    recipe = yaml.safe_load((project / "my_recipe.yaml").read_text())
    recipe["workload"]["options"] = {"width": 16}
    recipe |= {"variants": ["baseline-fp32"], "gates": [], "targets": ["quick"]}
    recipe |= {"train": {"epochs": 1, "learning_rate": 3e-3}, "finetune": {"epochs": 10}}
    recipe["benchmark"] = {"min_duration_s": 0.5, "min_queries": 100, "max_extensions": 0}
    (project / "my_recipe.yaml").write_text(yaml.safe_dump(recipe))
    (project / "targets").mkdir()
    target = {"name": "quick", "kind": "loopback", "orphan_grace_s": QUICK_GRACE_S}
    (project / "targets/quick.yaml").write_text(yaml.safe_dump(target))
    return project


def wait_for_line(process, *words):
    """Reads stderr until a line holds all the words, the first of them in front."""
    for line in process.stderr:
        if line.strip().startswith(words[0]) and all(word in line for word in words):
            return
    pytest.fail(f"the run ended before it said {words}")


def wait_for_work(running_on_target):
    """The first line of a stage may tell of what comes before: the lease, or a file that is sent."""
    deadline = time.monotonic() + 10
    while not running_on_target():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_epochs(home, count):
    """Until the resume file of a training that began just now tells of so many finished epochs."""
    began, deadline = time.time() - 5, time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in (home / "work").glob("*/training-*.pt"):
            if path.stat().st_mtime > began and len(torch.load(path, weights_only=True)["history"]) > count:
                return
        time.sleep(0.05)
    pytest.fail("no epoch was finished in time")


@pytest.fixture
def running_on_target(processes, cli_home):
    """Command lines of what runs in a target's folder below the home of this test."""

    def find():
        found = processes(f"{cli_home}/targets/")
        return [command for command in found if "loopback_server" not in command]

    return find


def job_folders(home):
    return list((home / "targets").glob("**/jobs/*"))


def assert_lease_is_free():
    with lease.held("cpu", job="test", timeout_s=10, wait=lambda seconds, holder: None):
        pass


def newest_runs(home, count):
    return Tracker(f"sqlite:///{home / 'mlflow.db'}").pipeline_runs(limit=count)


def statuses(home, count):
    """Of the newest runs, newest first."""
    return [run.status for run in newest_runs(home, count)]


def flow_states(home, count):
    """The same as Prefect tells them."""
    api_url = running_server(home=home).api_url
    runs = [run.tags["prefect.flow_run_id"] for run in newest_runs(home, count)]
    states = []
    for flow_run_id in runs:
        with urllib.request.urlopen(f"{api_url}/flow_runs/{flow_run_id}", timeout=30) as response:
            states.append(json.load(response)["state_type"])
    return states


# case: (the words on stderr at which the run is killed, its options, the target's grace, host stages done again)
KILLS = {
    "finetune": (["finetune"], TWO_VARIANTS, QUICK_GRACE_S, {"finetune", "export", "lower", "verify"}),
    "build": (["build baseline-fp32"], (), QUICK_GRACE_S, set()),
    "benchmark": (["benchmark", "round"], LONG_BENCHMARK, DEFAULT_GRACE_S, set()),
}


def by_stage(cases, default):
    """All of them are slow but one."""
    return [pytest.param(stage, marks=[] if stage == default else [pytest.mark.slow]) for stage in cases]


@pytest.mark.parametrize("stage", by_stage(KILLS, "benchmark"))
def test_killed_run_leaves_nothing_and_the_next_one_goes_on(
    stage, quick_project, start_jetway, jetway_here, running_on_target, cli_home
):
    words, options, grace_s, redone = KILLS[stage]
    # A seed of its own, so that no other run can have made its results.
    command = ["run", "my_recipe.yaml", "--set", f"seed={100 + list(KILLS).index(stage)}"]
    target = "quick" if grace_s == QUICK_GRACE_S else "loopback"
    killed = start_jetway(*command, *options, "--target", target, cwd=quick_project)
    wait_for_line(killed, *words)
    if stage == "finetune":
        wait_for_epochs(cli_home, 2)
    else:
        wait_for_work(running_on_target)
    killed.kill()
    deadline = time.monotonic() + grace_s
    assert not over(stage, killed.stderr), "the stage had ended before the kill"
    while running := running_on_target():
        assert time.monotonic() < deadline, running
        time.sleep(0.05)
    assert_lease_is_free()

    again = options if stage == "finetune" else ()
    resumed = jetway_here(*command, *again, "--json", cwd=quick_project)
    assert resumed.json["status"] == "FINISHED", resumed.stderr
    assert {name.split()[0] for name in resumed.stages(cached=False)} & HOST_STAGES == redone
    if stage == "finetune":
        first_line = next(line for line in resumed.stderr.splitlines() if line.strip().startswith("finetune"))
        assert "epoch 1/" not in first_line, "fine-tuning started over"
    assert job_folders(cli_home) == []
    assert statuses(cli_home, 2) == ["FINISHED", "KILLED"]
    assert flow_states(cli_home, 2) == ["COMPLETED", "CRASHED"]


def over(stage, stderr):
    """Whether one of the lines that are left says that the stage ended, after so many seconds."""
    return any(line.strip().startswith(stage) and line.endswith(" s\n") for line in stderr)


INTERRUPTS = {
    "load": (["load", "epoch"], ("--set", "train.epochs=50")),
    "build": (["build baseline-fp32"], ()),
    "benchmark": (["benchmark", "round"], LONG_BENCHMARK),
}


@pytest.mark.parametrize("stage", by_stage(INTERRUPTS, "build"))
def test_ctrl_c_ends_everything_and_says_so(stage, quick_project, start_jetway, running_on_target, cli_home):
    words, options = INTERRUPTS[stage]
    process = start_jetway("run", "my_recipe.yaml", *options, cwd=quick_project)
    wait_for_line(process, *words)
    if stage != "load":
        wait_for_work(running_on_target)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    said = process.stderr.read()
    assert "interrupted" in said
    assert "Traceback" not in said
    assert running_on_target() == []
    assert job_folders(cli_home) == []
    assert_lease_is_free()
    assert statuses(cli_home, 1) == ["KILLED"]
