"""Tracking through a real MLflow server, and processes that meet a fresh database together."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from jetway.flows.ui import _free_port, _process, _wait_for
from jetway.tasks.artifacts import Checkpoint, StageOutput, json_sha256
from jetway.tasks.errors import TrackingError
from jetway.tasks.store import Store
from jetway.tasks.tracking.index import MlflowStageIndex, used_keys
from jetway.tasks.tracking.tracker import Tracker

FIRST_USE = """
from jetway.tasks.tracking.tracker import Tracker
tracker = Tracker()
tracker.finish(tracker.start_run("digits"), "FINISHED")
"""


@pytest.fixture(scope="module")
def server_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that keeps the artifacts to itself, as a team's does."""
    folder = tmp_path_factory.mktemp("mlflow")
    port = _free_port(0)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    uri = f"sqlite:///{folder / 'server.db'}"
    command += ["--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    log = folder / "server.log"
    with log.open("w") as output, _process(command, uri, output.fileno()) as process:
        _wait_for(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"


def test_two_homes_share_stages_through_a_server(
    server_uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = Store(tmp_path / "ours"), Store(tmp_path / "theirs")
    tracker, key = Tracker(server_uri), json_sha256("key")
    with ours.scratch() as folder:
        (folder / "weights").write_bytes(b"weights" * 1000)
        output = StageOutput(handle=ours.add(Checkpoint, folder / "weights"))
    run_id = tracker.start_run("digits", {"qat.epochs": 3})
    MlflowStageIndex(tracker, ours, run_id=run_id).record(key, "prune", output, 1.0)
    tracker.log_files(run_id, {"prune/pruned.safetensors": (output.handle, ours.open(output.handle))})

    other = Tracker(server_uri)
    found = MlflowStageIndex(other, theirs).find(key)
    assert found is not None
    assert theirs.open(found.handle).read_bytes() == b"weights" * 1000
    assert other.files(run_id) == {"prune/pruned.safetensors": output.handle}
    assert used_keys(other, run_id) == {key}
    assert other.local_folder(run_id) is None
    fetched = other.load_file(run_id, "prune/pruned.safetensors", tmp_path)
    assert fetched.read_bytes() == b"weights" * 1000
    assert other.find_run(run_id[:8]).params == {"qat.epochs": "3"}
    assert other.has_file(run_id, "prune/pruned.safetensors")
    assert not other.has_file(run_id, "prune/other.safetensors")
    assert not other.has_file(run_id, "no folder/other.safetensors")
    assert "Downloading" not in capfd.readouterr().err


def test_a_server_that_is_gone_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = _free_port(0)
    with pytest.raises(TrackingError, match=rf"127\.0\.0\.1:{port} could not"):
        Tracker(f"http://127.0.0.1:{port}").pipeline_runs()


def test_processes_that_meet_a_fresh_home_together_make_one_database_quietly(tmp_path: Path) -> None:
    home = tmp_path / "a home"
    environment = os.environ | {"JETWAY_HOME": str(home)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_USE],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [(process.communicate()[0], process.returncode) for process in processes] == [("", 0)] * 2
    runs = Tracker(f"sqlite:///{home / 'mlflow.db'}").pipeline_runs()
    assert [run.status for run in runs] == ["FINISHED"] * 2
    assert {run.experiment for run in runs} == {"digits"}
    assert [path.name for path in tmp_path.iterdir()] == ["a home"]


def test_promotion_through_a_server_makes_a_version_whose_files_can_be_fetched(
    server_uri: str, tmp_path: Path
) -> None:
    tracker, store = Tracker(server_uri), Store(tmp_path / "ours")
    run_id = tracker.start_run("digits")
    child = tracker.start_child(run_id, "a variant", {}, {"variant": "pruned-fp32", "target": "loopback"})
    handle = store.add_json({"an": "engine"})
    tracker.log_files(child, {"engine.engine": (handle, store.open(handle))})
    promoted = tracker.promote("digits.loopback", child, "The first.", {"target_class": "loopback"})
    assert Tracker(server_uri).champion("digits.loopback") == promoted
    client = MlflowClient(server_uri)
    source = client.get_model_version_download_uri(promoted.model, str(promoted.version))
    fetched = download_artifacts(f"{source}/engine.engine", dst_path=str(tmp_path), tracking_uri=server_uri)
    assert Path(fetched).read_bytes() == store.open(handle).read_bytes()
