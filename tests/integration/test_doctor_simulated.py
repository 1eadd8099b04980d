"""The doctor and the deployed checks on fake Jetsons: plumbing through TensorRT's double, which builds nothing."""

import json

import pytest

from jetway.configs.schema import Target
from jetway.flows import doctor as flow
from jetway.tasks.store import Store
from jetway.tasks.tracking.tracker import Tracker

pytest_plugins = ["doubles.fake_jetson.fixtures"]
pytestmark = [pytest.mark.serial, pytest.mark.filterwarnings("default")]

NANO, SERVER = "simulated-nano-jp46", "simulated-server-tensorrt11"
NETWORK = "conv-relu-add"


@pytest.fixture
def diagnosed(switch_on, tmp_path, monkeypatch):
    """The checks of one network on a fake, by name."""
    monkeypatch.setattr(flow, "TINY_NETWORKS", {NETWORK: flow.TINY_NETWORKS[NETWORK]})

    def diagnose(name):
        target = Target.model_validate(switch_on(name).target_values())
        diagnosis = flow.diagnose(target, Store(tmp_path / name), lambda *step: None)
        assert diagnosis.report().count("SIMULATED") > 1
        return {check.name: check for check in diagnosis.checks}

    return diagnose


def verdicts(checks, *names):
    return [str(checks[name].verdict) for name in names]


@pytest.mark.slow
def test_a_double_that_computes_answers_as_the_host(diagnosed):
    checks = diagnosed(SERVER)
    precisions = [f"{NETWORK} {name}" for name in ("fp32", "fp16", "bf16", "int8-ptq")]
    assert verdicts(checks, "engine", "lease", "benchmark", *precisions) == ["PASS"] * 7
    assert verdicts(checks, "real device", "int8-calibrated", "power mode") == ["SKIPPED"] * 3
    assert "has no calibrator" in checks["int8-calibrated"].evidence
    assert {"trtexec fp32", "trtexec int8-ptq"} <= checks.keys()


def test_a_double_that_computes_something_else_is_found_out(diagnosed):
    checks = diagnosed(NANO)
    assert verdicts(checks, "bf16", "int8-ptq") == ["SKIPPED"] * 2
    assert verdicts(checks, f"{NETWORK} fp32", f"{NETWORK} fp16") == ["FAIL"] * 2
    assert verdicts(checks, "clocks", "power mode", "power rails", "telemetry") == ["PASS"] * 4
    assert checks["power rails"].values.keys() == {"POM_5V_IN", "POM_5V_GPU", "POM_5V_CPU"}


@pytest.mark.slow
def test_an_engine_without_a_package_is_checked_too(on_jetsons, jetway_here, jetson_project, cli_home):
    assert on_jetsons("run", SERVER, variants=["baseline-fp32"]).exit_code in (0, 5)
    run = jetway_here(
        "check", "changed.yaml", "--deployed", "--soak", "0.02", "--target", SERVER, cwd=jetson_project
    )
    folder = Tracker(f"sqlite:///{cli_home / 'mlflow.db'}")
    latest = folder.find_run("latest")
    (path,) = (folder.local_folder(latest.run_id) / f"targets/{SERVER}/deployed").glob("*.json")
    found = {check["name"]: check["verdict"] for check in json.loads(path.read_text())["checks"]}
    passed = ("ONNX model", "engine file", "passport", "board and version", "dependencies", "accuracy")
    assert [found[name] for name in passed] == ["PASS"] * 6, run.stdout
    assert [found[name] for name in ("real device", "package answers")] == ["SKIPPED"] * 2
    assert found["soak: memory"] in ("PASS", "SKIPPED")
