"""Plan B on the loopback target: a gate on the size, which lies between what two fallbacks give."""

import pytest
import yaml

from jetway.tasks.deployment import find_deployment
from jetway.tasks.tracking.tracker import Tracker

pytestmark = [pytest.mark.team, pytest.mark.filterwarnings("default")]


@pytest.fixture
def recipe(project):
    """The README's recipe, short, with a gate that it misses; ``recipe(**keys)`` changes keys."""
    path = project / "my_recipe.yaml"
    values = yaml.safe_load(path.read_text()) | {
        "train": {"epochs": 1},
        "finetune": {"epochs": 1},
        "variants": ["baseline-fp32", "pruned-fp32"],
        "benchmark": {"min_duration_s": 0.3, "min_queries": 50},
        "gates": ["pruned-fp32: size_ratio <= 0.2"],
    }
    return lambda **keys: path.write_text(yaml.safe_dump(values | keys))


def fallback(name, **overrides):
    return {"name": name, "overrides": {key.replace("__", "."): value for key, value in overrides.items()}}


def is_valid(tracker, run_id):
    return all(child.tags["validity"] == "VALID" for child in tracker.children(run_id))


def test_fallbacks_are_tried_in_order_until_one_passes(project, recipe, jetway_here, cli_home):
    recipe(
        plan_b=[
            fallback("train-more", finetune__epochs=2),
            fallback("prune-more", prune__pruning_ratio=0.8),
            fallback("prune-most", prune__pruning_ratio=0.9),
        ]
    )
    run = jetway_here("run", "my_recipe.yaml", "--json", cwd=project)
    told = run.json
    ladder = {rung["name"]: rung for rung in told["ladder"]}
    more = ladder["prune-more"]["gains"][0]
    assert more["measured_size_ratio"] < 0.8
    assert more["predicted_size_ratio"] == pytest.approx(more["measured_size_ratio"], abs=0.1)
    assert ladder["train-more"]["gains"][0]["measured_size_ratio"] == pytest.approx(1.0, abs=0.01)
    assert ladder["train-more"]["status"] == "MISSED"

    tracker = Tracker(f"sqlite:///{cli_home / 'mlflow.db'}")
    tried = tracker.fallbacks(told["run_id"])
    if not all(is_valid(tracker, one.run_id) for one in tried):
        pytest.skip("others kept the machine busy, so that a session was INVALID")
    assert [rung["status"] for rung in told["ladder"]] == ["MISSED", "PASSED", "NOT TRIED"], run.stderr
    assert more["passed"]
    assert (run.exit_code, told["targets"][0]["plan_b"]) == (0, "prune-more")
    record = tracker.run(told["run_id"])
    assert (record.tags["plan_b"], record.tags["gate"]) == ("prune-more on loopback", "PASS")
    assert [one.tags["fallback"] for one in tried] == ["train-more", "prune-more"]
    assert tried[1].metrics["loopback.measured_size_ratio"] == more["measured_size_ratio"]
    assert [child.tags["variant"] for child in tracker.children(tried[1].run_id)] == [
        "baseline-fp32",
        "pruned-fp32",
    ]
    assert "targets/loopback/package.zip" in tracker.files(tried[1].run_id)
    report = (tracker.local_folder(record.run_id) / "report.html").read_text()
    assert "Plan B: prune-more passed on loopback" in report
    assert "NOT TRIED" in report
    shown = jetway_here("show", record.run_id[:12], cwd=project)
    assert "prune-most" in shown.stdout
    assert jetway_here("show", tried[0].run_id[:12], cwd=project).exit_code == 0
    assert find_deployment(tracker, "mine", "loopback").run.run_id == tried[1].run_id


def test_a_fallback_that_cannot_be_is_refused_before_anything_starts(project, recipe, jetway_here):
    recipe(plan_b=[fallback("narrow", workload__options={"widht": 8})])
    run = jetway_here("run", "my_recipe.yaml", cwd=project)
    assert run.exit_code == 2
    assert all(word in run.stderr for word in ("plan_b narrow", "widht"))
    assert run.stdout == ""
