"""The whole pipeline as a user runs it: the command, a real SSH server, a real Prefect server, MLflow on sqlite."""

import json

import pytest
from jetway.tasks.tracking.tracker import Tracker

pytestmark = pytest.mark.serial

NOISE = ("Traceback", "Warning", "prefect -", "Error")


HOST_STAGES = {"load", "analyze", "prune", "finetune", "ptq", "qat", "export", "lower", "verify"}


def on_host(stages):
    return [stage for stage in stages if stage.split()[0] in HOST_STAGES]


def variants(run):
    return [row["variant"] for row in run.json["variants"]]


def test_readme_example_deploys_and_then_is_reused(project, jetway, cli_home):
    first = jetway("run", "my_recipe.yaml", "--json", cwd=project)
    assert first.exit_code == 0, first.stderr
    assert variants(first) == ["baseline-fp32", "pruned-fp32", "pruned-int8-qat"]
    assert all(noise not in first.stderr for noise in NOISE), first.stderr
    assert first.metrics("pruned-int8-qat")["size_ratio"] < 0.6
    assert all(row["metrics"]["top1"] > 0.8 for row in first.json["variants"])
    assert all(row["metrics"]["latency_ms_p50"] > 0 for row in first.json["variants"])

    again = jetway("run", "my_recipe.yaml", "--json", cwd=project)
    assert again.exit_code == 0, again.stderr
    assert on_host(again.stages(cached=False)) == []
    assert again.metrics("pruned-int8-qat")["top1"] == first.metrics("pruned-int8-qat")["top1"]

    changed = jetway("run", "my_recipe.yaml", "--json", "--set", "qat.epochs=2", cwd=project)
    assert changed.exit_code == 0, changed.stderr
    reran = [stage for stage in changed.stages(cached=False) if stage in host_stages]
    assert reran == ["qat", "export", "lower", "verify"]
    assert set(changed.stages(cached=True)) == {
        "load",
        "analyze",
        "prune",
        "finetune",
        "ptq",
        "export",
        "verify",
    }

    check_record(cli_home, first.json)
    shown = jetway("show", first.json["run_id"][:12], cwd=project)
    assert shown.exit_code == 0
    assert "pruned-int8-qat" in shown.stdout


def check_record(home, document):
    """The same metric names in every child run, every artifact, and the table as the description."""
    tracker = Tracker(f"sqlite:///{home / 'mlflow.db'}")
    run = tracker.run(document["run_id"])
    assert run.status == "FINISHED"
    assert "pruned-int8-qat" in run.tags["mlflow.note.content"]
    assert run.params["qat.epochs"] == "1"
    children = tracker.children(run.run_id)
    assert [child.tags["variant"] for child in children] == [
        "baseline-fp32",
        "pruned-fp32",
        "pruned-int8-qat",
    ]
    assert len({frozenset(child.metrics) for child in children}) == 1
    assert {child.tags["validity"] for child in children} <= {"VALID", "INVALID"}
    paths = set(tracker.files(run.run_id))
    expected = {
        "load/load.safetensors", "analyze/analysis.json", "analyze/analysis.png", "prune/prune.safetensors",
        "finetune/finetune.safetensors", "pruned/qat.safetensors", "pruned-int8-qat/export.onnx",
        "targets/loopback/samples.safetensors",
    }  # fmt: skip
    assert expected <= paths
    for child in children:
        assert {"checkpoint.safetensors", "model.onnx", "engine.engine", "records.json"} <= set(
            tracker.files(child.run_id)
        )
        passport = tracker.load_json(child.run_id, "passport.json")
        assert passport["engine_sha256"] == tracker.files(child.run_id)["engine.engine"].sha256
    json.dumps(tracker.load_json(run.run_id, "environment.json"))
