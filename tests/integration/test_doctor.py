"""``jetway doctor`` on the loopback target, and on targets that something is wrong with."""

import getpass
import json
import socket

import pytest

from jetway.configs.schema import Precision, Target
from jetway.flows import doctor as flow
from jetway.tasks.doctor import Case
from jetway.tasks.onnx_graph import Graph
from jetway.tasks.store import Store
from jetway.tasks.target.session import open_target

pytestmark = pytest.mark.serial

LOOPBACK = Target(name="loopback", kind="loopback")


def no_progress(*step):
    pass


def test_the_loopback_target_is_well(tmp_path, jetway):
    run = jetway("doctor", "loopback", "--json", "--report", "report.md", cwd=tmp_path)
    assert run.exit_code == 0, run.stdout + run.stderr
    verdicts = {check["name"]: check["verdict"] for check in run.json["checks"]}
    assert {"connection", "engine", "lease", "disk", "memory", "benchmark"} <= verdicts.keys()
    for network in ("conv-relu-add", "depthwise", "matmul"):
        assert verdicts[f"{network} fp32"] == verdicts[f"{network} int8-ptq"] == "PASS"
    assert verdicts["bf16"] == verdicts["trtexec"] == "SKIPPED"
    report = (tmp_path / "report.md").read_text()
    for name in (f" {getpass.getuser()}", socket.gethostname(), "127.0.0.1", str(tmp_path)):
        assert name not in report
    assert json.loads(report.partition("```json\n")[2].partition("\n```")[0])["passed"] is True


def test_a_target_that_is_away_is_reported_too(tmp_path, jetway_here):
    (tmp_path / "away.yaml").write_text("{name: away, host: 127.0.0.1, port: 1, user: somebody}")
    run = jetway_here("doctor", "away", cwd=tmp_path)
    assert run.exit_code == 3
    assert "FAIL" in run.stdout
    report = (tmp_path / "jetway-doctor-away.md").read_text()
    assert "| connection | FAIL |" in report
    assert "somebody" not in report
    assert "127.0.0.1" not in report


def test_a_report_wants_a_folder(tmp_path, jetway_here):
    run = jetway_here("doctor", "loopback", "--report", "no/such/report.md", cwd=tmp_path)
    assert run.exit_code == 2
    assert "--report no/such/report.md" in run.stderr


def test_a_target_with_too_little_room_or_without_its_engine_fails(jetway_home, tmp_path):
    target = LOOPBACK.model_copy(update={"min_free_disk_mib": 10**9, "engine": "tensorrt"})
    diagnosis = flow.diagnose(target, Store(tmp_path), no_progress)
    failed = {check.name: check.evidence for check in diagnosis.checks if check.verdict == "FAIL"}
    assert failed.keys() == {"disk", "engine"}
    assert "tensorrt is not there" in failed["engine"]


def test_a_network_that_computes_something_else_there_fails(jetway_home, tmp_path, monkeypatch):
    """The file that is built is another than the one that this host computed."""
    lower = flow.lower_onnx

    def lower_wrongly(context, exported, *rest):
        graph = Graph.load(context.store.open(exported))
        bias = next(name for name, array in graph.constants.items() if array.ndim == 1)
        graph.constants[bias] = graph.constants[bias] + 1
        with context.store.scratch() as folder:
            (folder / "wrong.onnx").write_bytes(graph.to_model().SerializeToString())
            handle = context.store.add(type(exported), folder / "wrong.onnx", metadata=exported.metadata)
        return lower(context, handle, *rest)

    monkeypatch.setattr(flow, "lower_onnx", lower_wrongly)
    with open_target(LOOPBACK) as session:
        case = Case("fp32", Precision.FP32)
        trial = flow.Trial(session, Store(tmp_path), no_progress, [case])
        check = trial.run("matmul", case)
        assert check.verdict == "FAIL"
        assert check.values["error_ratio"] > 0.1
        remote = trial._engines["matmul", "fp32"].metadata["remote_path"]
        trial.clean_up()
        listed = session.connection.run(["ls", remote], timeout_s=10, check=False)
        assert listed.exit_status != 0, "the doctor leaves no engines behind"
