"""The local Prefect server's files and messages, without starting Prefect."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from jetway.flows import server_process
from jetway.flows.server import Server, running_server, start_server, stop_server
from jetway.tasks.errors import TrackingError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "a home"
    monkeypatch.setenv("JETWAY_HOME", str(folder))
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "DO_NOT_TRACK", "PREFECT_SERVER_EPHEMERAL_ENABLED"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return folder


def test_a_server_of_the_user_is_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect.example:4200/api")
    with start_server() as server:
        assert server.api_url == "http://prefect.example:4200/api"
        assert server.ui_url == "http://prefect.example:4200"
    assert running_server() is None
    assert not (home / "prefect" / "server.json").exists()
    assert os.environ["PREFECT_HOME"] == str(home / "prefect")


def test_wait_ready_names_the_address_that_is_silent() -> None:
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9/api .*unset PREFECT_API_URL"):
        Server("http://127.0.0.1:9/api").wait_ready(0.2)


def test_wait_ready_reports_a_server_that_died_with_the_end_of_its_log(home: Path) -> None:
    folder = home / "prefect"
    folder.mkdir(parents=True)
    (folder / "server.log").write_text("first\nImportError: no such thing\n")
    with pytest.raises(TrackingError, match=r"ended while it started.*ImportError: no such thing"):
        Server("http://127.0.0.1:9/api", folder=folder).wait_ready()


def test_stop_server_says_when_there_is_none(home: Path) -> None:
    assert not stop_server()
    assert not home.exists()


def test_state_of_a_dead_server_is_not_believed(home: Path) -> None:
    folder = home / "prefect"
    folder.mkdir(parents=True)
    (folder / "server.lock").touch()
    (folder / "server.json").write_text(json.dumps({"pid": os.getpid(), "port": 1}))
    assert running_server() is None
    assert not stop_server()


def test_the_watch_ends_when_no_client_holds_on(home: Path) -> None:
    home.mkdir()
    (home / "server.json").touch()
    lock = home / "clients.lock"
    with lock.open("a") as client, lock.open("a") as watch:
        fcntl.flock(client, fcntl.LOCK_SH)
        assert not server_process._try_lock(watch)
    hold = server_process._wait_until_unused(home, 0.2)
    assert hold is not None
    with lock.open("a") as client, pytest.raises(BlockingIOError):
        fcntl.flock(client, fcntl.LOCK_SH | fcntl.LOCK_NB)
    hold.close()


def test_the_watch_ends_when_its_folder_is_gone(home: Path) -> None:
    assert server_process._wait_until_unused(home, 3600) is None
