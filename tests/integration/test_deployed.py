"""``jetway check --deployed`` on the loopback target: as deployed, with a soak; then damaged, changed, and gone."""

import json
from pathlib import Path

import pytest

from jetway.tasks.deployed import SLOWER_MACHINE
from jetway.tasks.tracking.tracker import Tracker

pytestmark = pytest.mark.filterwarnings("default")

SMALL = [
    "--set", "train.epochs=3", "--set", "variants=[baseline-fp32]", "--set", 'gates=["top1 >= 0.5"]',
    "--set", "benchmark.min_duration_s=0.3", "--set", "benchmark.min_queries=50", "--set", "benchmark.max_extensions=0",
]  # fmt: skip
# Other work on this machine may make them FAIL, and must then be named.
TIMED = {"recorded run", "latency", "soak: frame rate"}
ON_LOOPBACK = {
    "ONNX model": "PASS", "engine file": "PASS", "passport": "PASS", "board and version": "PASS",
    "dependencies": "PASS", "disk": "PASS", "memory": "PASS", "camera": "SKIPPED", "package answers": "PASS",
    "package refuses bad input": "PASS", "accuracy": "PASS", "real time": "PASS", "soak: memory": "PASS",
}  # fmt: skip


class Checked:
    """What a check left in MLflow."""

    def __init__(self, home):
        tracker = Tracker(f"sqlite:///{home / 'mlflow.db'}")
        run = tracker.find_run("latest")
        folder = tracker.local_folder(run.run_id) / "targets/loopback/deployed"
        newest = max(folder.glob("*.json"))
        self.count = len(list(folder.glob("*.json")))
        self.document = json.loads(newest.read_text())
        self.markdown = newest.with_suffix(".md").read_text()
        self.verdict = run.tags["deployed.loopback"]
        self.verdicts = {check["name"]: check["verdict"] for check in self.document["checks"]}
        self.evidence = {check["name"]: check["evidence"] for check in self.document["checks"]}
        self.failed = {name for name, verdict in self.verdicts.items() if verdict == "FAIL"} - TIMED


def test_what_was_deployed_is_checked_against_its_record(project, jetway, jetway_here, cli_home):
    def check(*more):
        run = jetway_here("check", "my_recipe.yaml", "--deployed", *SMALL, *more, cwd=project)
        return run, Checked(cli_home)

    nothing = jetway_here("check", "my_recipe.yaml", "--deployed", "--set", "name=never-run", cwd=project)
    assert nothing.exit_code == 6
    assert "jetway run never-run --target loopback" in nothing.stderr

    assert jetway("run", "my_recipe.yaml", "--json", *SMALL, cwd=project).exit_code in (0, 5)

    run, found = check("--soak", "0.05")
    assert {name: found.verdicts[name] for name in ON_LOOPBACK} == ON_LOOPBACK
    assert found.failed == set()
    excuses = ("INVALID", SLOWER_MACHINE)
    latency = found.evidence["latency"]
    assert found.verdicts["latency"] == "PASS" or any(excuse in latency for excuse in excuses), latency
    assert run.exit_code == (0 if "FAIL" not in found.verdicts.values() else 1)
    assert found.verdict == ("PASS" if run.exit_code == 0 else "FAIL")
    assert f"| accuracy | PASS | {found.evidence['accuracy']} |" in found.markdown
    assert "baseline-fp32 of run" in run.stdout

    engine = engine_path(cli_home)
    whole = engine.read_bytes()
    engine.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    run, found = check()
    assert run.exit_code == 1
    assert found.failed == {"engine file", "accuracy"}
    assert "corrupt: sha256" in found.evidence["engine file"]
    assert "corrupt" in found.evidence["accuracy"]
    assert "corrupt" in found.evidence["latency"]
    assert found.verdicts["soak: memory"] == "SKIPPED"
    engine.write_bytes(whole)

    passport = engine.with_name(engine.name + ".json")
    text = passport.read_text()
    stated = json.loads(text)
    stated["platform"]["engine_version"] = "1.0.0"
    passport.write_text(json.dumps(stated))
    run, found = check()
    assert run.exit_code == 1
    assert found.failed == {"passport", "accuracy"}
    assert found.evidence["passport"] == "differs from the recorded one in: platform"
    assert "built for another machine" in found.evidence["accuracy"]
    passport.write_text(text)

    engine.unlink()
    run, found = check()
    assert found.failed == {"engine file", "accuracy"}
    assert "no longer on the target" in found.evidence["engine file"]
    assert found.count == 4, "each check keeps its own record"


def engine_path(home):
    """The engine that the newest run deployed: the loopback target's files are this machine's."""
    tracker = Tracker(f"sqlite:///{home / 'mlflow.db'}")
    (child,) = tracker.children(tracker.find_run("latest").run_id)
    return Path(tracker.load_json(child.run_id, "passport.json")["remote_path"])
