"""The whole pipeline as a user runs it: the command, a real SSH server, a real Prefect server, MLflow on sqlite."""

import json
from uuid import UUID

import pytest
import yaml
from conftest import readme_block

from jetway.flows.server import prefect_settings, running_server
from jetway.flows.zombies import FLOW_RUN_TAG
from jetway.tasks.tracking.tracker import Tracker

# What libraries warn of is a matter of their tests; the first run's output is checked for noise.
pytestmark = pytest.mark.filterwarnings("default")

NOISE = ("Traceback", "Warning", "prefect -", "Error")
HOST_STAGES = {"load", "analyze", "prune", "finetune", "ptq", "qat", "export", "lower", "verify"}
QUICK_BENCHMARK = ("--set", "benchmark.min_duration_s=0.5", "--set", "benchmark.min_queries=100")
VARIANTS = ["baseline-fp32", "pruned-fp32", "pruned-int8-qat"]


def on_host(stages):
    return [stage for stage in stages if stage.split()[0] in HOST_STAGES]


def finished(run):
    """It ran to its end. On a machine that others keep busy its measurement may be INVALID, and must say so."""
    document = run.json
    assert document["status"] == "FINISHED", run.stderr
    disturbed = not all(row["validity"]["valid"] for row in document["variants"])
    assert run.exit_code == (5 if disturbed else 0), run.stderr
    return document


def test_readme_example_deploys_and_then_is_reused(project, jetway, jetway_here, cli_home):
    first = jetway("run", "my_recipe.yaml", "--json", cwd=project)
    document = finished(first)
    assert [row["variant"] for row in document["variants"]] == VARIANTS
    assert all(noise not in first.stderr for noise in NOISE), first.stderr
    assert first.metrics("pruned-int8-qat")["size_ratio"] < 0.6
    assert all(row["metrics"]["top1"] > 0.8 for row in document["variants"])
    assert all(row["metrics"]["latency_ms_p50"] > 0 for row in document["variants"])
    assert all(gate["passed"] for row in document["variants"] for gate in row["gates"])

    again = jetway_here("run", "my_recipe.yaml", "--json", *QUICK_BENCHMARK, cwd=project)
    finished(again)
    assert on_host(again.stages(cached=False)) == []
    assert again.metrics("pruned-int8-qat")["top1"] == first.metrics("pruned-int8-qat")["top1"]

    changed = jetway_here(
        "run", "my_recipe.yaml", "--json", "--set", "qat.epochs=2", *QUICK_BENCHMARK, cwd=project
    )
    finished(changed)
    after_qat = {f"{stage} pruned-int8-qat" for stage in ("export", "lower", "verify")}
    assert set(on_host(changed.stages(cached=False))) == {"qat", *after_qat}
    before_qat = set(on_host(first.stages(cached=False))) - {"qat", *after_qat}
    assert set(on_host(changed.stages(cached=True))) == before_qat

    check_record(cli_home, document)
    check_tags(cli_home, document["run_id"])
    shown = jetway_here("show", document["run_id"][:12], cwd=project)
    assert shown.exit_code == 0
    assert "pruned-int8-qat" in shown.stdout
    check_comparison(jetway_here, project, [run.json["run_id"] for run in (first, again, changed)])


def test_readme_example_of_two_inputs_and_two_outputs_deploys(project, jetway):
    (project / "my_package/pairs.py").write_text(readme_block("two inputs example"))
    recipe = yaml.safe_load(readme_block("recipe example")) | {
        "name": "pairs",
        "workload": {"class_path": "my_package.pairs:PairWorkload"},
        "train": {"epochs": 8, "learning_rate": 3e-3},
        "gates": [],
    }
    (project / "pairs.yaml").write_text(yaml.safe_dump(recipe))
    run = jetway("run", "pairs.yaml", "--json", *QUICK_BENCHMARK, cwd=project)
    document = finished(run)
    assert [row["variant"] for row in document["variants"]] == VARIANTS
    for row in document["variants"]:
        assert row["metrics"]["total_right"] > 0.6
        assert row["metrics"]["same_right"] > 0.8
    assert set(run.metrics("pruned-int8-qat")) >= {"total_right_drop", "same_right_drop"}


def check_tags(home, run_id):
    """The process stands on the flow run alone: for each tag of a task Prefect asks its server before it starts."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    flow_run_id = UUID(Tracker(f"sqlite:///{home / 'mlflow.db'}").run(run_id).tags[FLOW_RUN_TAG])
    ours = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    with prefect_settings(running_server(home=home)), get_client(sync_client=True) as client:
        (tag,) = client.read_flow_run(flow_run_id).tags
        assert tag.startswith("process:")
        tasks = client.read_task_runs(flow_run_filter=ours)
    assert [task.tags for task in tasks] == [[]] * len(tasks)
    assert len(tasks) > len(VARIANTS)


def check_comparison(jetway_here, project, run_ids):
    """A run with itself repeated, where nothing but times can have changed, and with one whose QAT was longer."""
    first, again, changed = run_ids
    repeated = jetway_here("compare", first, again, "--json", cwd=project).json
    told = {(one["change"], one["reason"]) for row in repeated["rows"] for one in row["metrics"]}
    assert ("SAME", "the same engine file") in told
    assert {change for change, _ in told} == {"SAME", "UNKNOWN"}
    trained = jetway_here("compare", again, changed, "--json", cwd=project).json
    assert trained["params"]["qat.epochs"] == ["1", "2"]
    scored = {row["variant"]: row["metrics"][-1] for row in trained["rows"]}
    assert scored["pruned-fp32"]["reason"] == "the same engine file"
    assert scored["pruned-int8-qat"]["evidence"]["count"] == 497
    options = ["--in-turns", "--minutes", "0.01", "--variant", "pruned-int8-qat", "--json"]
    (row,) = jetway_here("compare", again, changed, *options, cwd=project).json["rows"]
    measured = row["metrics"][-1]
    assert (measured["metric"], measured["change"]) == ("latency_ms_p50", "UNKNOWN")
    assert "where six are the fewest" in measured["reason"]


def test_project_with_folders_of_our_names_deploys(project, jetway):
    """A user's own data/, tasks/ and configs/, imported at the top of the workload and from within a method."""
    for name, text in {"data": "FIRST = 300", "tasks": "LAST = 500", "configs": "WIDTH = 16"}.items():
        (project / name).mkdir()
        (project / name / "__init__.py").touch()
        (project / name / "values.py").write_text(text + "\n")
    module = project / "my_package/my_module.py"
    text = module.read_text().replace("import torch\n", "import torch\nfrom data.values import FIRST\n", 1)
    text = text.replace("Images(1300, 1797)", "Images(FIRST, self.last())")
    text += "\n    def last(self):\n        from configs.values import WIDTH\n        from tasks.values import LAST\n"
    module.write_text(text + "        assert WIDTH == 16\n        return LAST\n")
    recipe = yaml.safe_load((project / "my_recipe.yaml").read_text())
    recipe["benchmark"] = {"min_duration_s": 0.3, "min_queries": 50}
    recipe |= {"variants": ["baseline-fp32"], "gates": [], "train": {"epochs": 1}}
    (project / "my_recipe.yaml").write_text(yaml.safe_dump(recipe))

    run = jetway("run", "my_recipe.yaml", "--json", cwd=project)
    assert [row["variant"] for row in finished(run)["variants"]] == ["baseline-fp32"]


def check_record(home, document):
    """The same metric names in every child run, every artifact, the table as the description, and the report."""
    tracker = Tracker(f"sqlite:///{home / 'mlflow.db'}")
    run = tracker.run(document["run_id"])
    assert run.status == "FINISHED"
    assert "pruned-int8-qat" in run.tags["mlflow.note.content"]
    assert run.params["qat.epochs"] == "1"
    children = tracker.children(run.run_id)
    assert [child.tags["variant"] for child in children] == VARIANTS
    assert len({frozenset(child.metrics) for child in children}) == 1
    assert {child.tags["validity"] for child in children} <= {"VALID", "INVALID"}
    paths = set(tracker.files(run.run_id))
    expected = {
        "load/load.safetensors", "analyze/analysis.json", "analyze/analysis.png", "prune/prune.safetensors",
        "finetune/finetune.safetensors", "pruned/qat.safetensors", "pruned-int8-qat/export.onnx",
        "targets/loopback/samples.safetensors", "targets/loopback/package.zip",
    }  # fmt: skip
    assert expected <= paths
    for child in children:
        assert {"checkpoint.safetensors", "model.onnx", "engine.engine", "records.json"} <= set(
            tracker.files(child.run_id)
        )
        passport = tracker.load_json(child.run_id, "passport.json")
        assert passport["engine_sha256"] == tracker.files(child.run_id)["engine.engine"].sha256
    json.dumps(tracker.load_json(run.run_id, "environment.json"))
    report = (tracker.local_folder(run.run_id) / "report.html").read_text()
    for told in (*VARIANTS, "top1 against latency", "How long queries took", passport["engine_sha256"][:16]):
        assert told in report
    assert tracker.page_of(run.run_id, "report.html") in run.tags["mlflow.note.content"]
