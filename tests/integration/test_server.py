"""One real local Prefect server: shared, quiet, patient, and gone when nobody needs it."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import pytest

from jetway.flows.server import Server, meet_server, queue_for, running_server, start_server, stop_server
from jetway.tasks.errors import TrackingError

IDLE_S = 3.0
FLOW = """
import logging, os, sys
from jetway.flows.server import prefect_settings, start_server

with start_server() as server:
    server.wait_ready()
    from prefect import flow, task

    @task(name="double", persist_result=False)
    def double(number):
        logging.getLogger("jetway").info("doubling %d", number)
        return 2 * number

    @flow(name="quiet", persist_result=False)
    def quiet():
        logging.getLogger("jetway").info("a line of the flow")
        return sum(future.result() for future in [double.submit(n) for n in range(3)])

    with prefect_settings(server):
        print(quiet())
"""
LOSES_ITS_SERVER = """
import json, os, sys, time
from pathlib import Path
from jetway.flows.server import prefect_settings, queue_for, start_server

with start_server() as server:
    server.wait_ready()
    from prefect import flow, task
    from prefect.runtime import flow_run

    @task(persist_result=False)
    def double(number):
        return 2 * number

    @flow(persist_result=False)
    def interrupted():
        print(flow_run.get_id(), flush=True)
        with queue_for("a board of its own"):
            state = Path(os.environ["JETWAY_HOME"], "prefect", "server.json")
            os.kill(json.loads(state.read_text())["pid"], 9)
            return sum(future.result() for future in [double.submit(n) for n in range(3)])

    with prefect_settings(server):
        print(interrupted())
"""
CLIENT = """
import sys
from jetway.flows.server import start_server
server = start_server(idle_s=float(sys.argv[1]))
print(server.api_url, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "a home"


@pytest.fixture(autouse=True)
def _environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JETWAY_HOME", str(home))
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "DO_NOT_TRACK", "PREFECT_SERVER_EPHEMERAL_ENABLED"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("PREFECT_API_URL", raising=False)
        with start_server(idle_s=IDLE_S, home=home) as started:
            started.wait_ready()
            yield started
        stop_server(home=home)


def start_client() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(IDLE_S)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def end_client(client: "subprocess.Popen[str]") -> None:
    client.kill()
    client.communicate()


def state(home: Path) -> dict[str, int]:
    loaded: dict[str, int] = json.loads((home / "prefect" / "server.json").read_text())
    return loaded


def wait_until_gone(home: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while running_server(home=home) is not None:
        assert time.monotonic() < deadline, f"still there after {timeout_s} s"
        time.sleep(0.1)


def test_flows_that_start_together_share_one_server(server: Server) -> None:
    clients = [start_client() for _ in range(2)]
    urls = {client.stdout.readline().strip() for client in clients if client.stdout}
    for client in clients:
        end_client(client)
    assert urls == {server.api_url}


def test_a_flow_prints_nothing_of_prefect_and_keeps_its_log_lines_there(server: Server) -> None:
    done = subprocess.run([sys.executable, "-c", FLOW], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("6\n", "", 0)
    request = urllib.request.Request(
        f"{server.api_url}/logs/filter", b"{}", {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        messages = [line["message"] for line in json.load(response)]
    assert {"a line of the flow", "doubling 0", "doubling 1", "doubling 2"} <= set(messages)


def test_a_server_that_dies_under_a_flow_is_started_again_and_learns_how_it_ended(server: Server) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOSES_ITS_SERVER], capture_output=True, text=True, timeout=180
    )
    flow_run_id, result = done.stdout.split()
    assert (result, done.returncode) == ("6", 0), done.stderr
    with urllib.request.urlopen(f"{server.api_url}/flow_runs/{flow_run_id}", timeout=30) as response:
        assert json.load(response)["state_type"] == "COMPLETED"


def test_a_slot_that_stays_taken_does_not_stop_a_run(server: Server) -> None:
    from jetway.flows.server import prefect_settings

    with prefect_settings(server), queue_for("loopback"):
        started = time.monotonic()
        with queue_for("loopback", timeout_s=1):
            waited = time.monotonic() - started
        with queue_for("another"):
            pass
    assert 0.9 <= waited < 15


def test_a_slot_that_sqlite_refuses_is_asked_for_again_at_once(server: Server) -> None:
    """Sqlite refuses some of them, as the server writes down meanwhile what becomes of the tasks."""
    from prefect import flow, task

    from jetway.flows.server import prefect_settings

    @task(persist_result=False)
    def nothing() -> None:
        pass

    def seconds_until_granted(name: str) -> float:
        began = time.monotonic()
        with queue_for(name):
            return time.monotonic() - began

    @flow(persist_result=False)
    def asking() -> list[float]:
        waits = []
        for number in range(10):
            futures = [nothing.submit() for _ in range(5)]
            waits.append(seconds_until_granted(f"board {number}"))
            for future in futures:
                future.result()
        return waits

    with prefect_settings(server):
        waits = asking()
    assert max(waits) < 1.5


def test_a_limit_may_be_made_by_several_at_once(server: Server) -> None:
    from jetway.flows.server import limit_to_one, prefect_settings

    with prefect_settings(server), ThreadPoolExecutor(4) as pool:
        names = [f"limit {number}" for number in range(10) for _ in range(4)]
        made = [pool.submit(copy_context().run, limit_to_one, name) for name in names]
    for future in made:
        future.result()


def test_queue_for_lets_the_errors_of_its_block_through(server: Server) -> None:
    from jetway.flows.server import prefect_settings

    with prefect_settings(server), pytest.raises(TimeoutError, match="my own"), queue_for("loopback"):
        raise TimeoutError("my own")


def test_the_server_outlives_its_clients_and_ends_when_idle_even_after_a_kill(
    server: Server, home: Path
) -> None:
    pid = state(home)["pid"]
    client = start_client()
    assert client.stdout is not None
    assert client.stdout.readline().strip() == server.api_url
    server.close()
    time.sleep(IDLE_S + 2.5)
    assert running_server(home=home) is not None
    client.send_signal(signal.SIGKILL)
    client.communicate()
    assert running_server(home=home) is not None
    wait_until_gone(home, IDLE_S + 20)
    assert not Path(f"/proc/{pid}/cmdline").exists() or Path(f"/proc/{pid}/cmdline").read_bytes() == b""


def test_a_server_started_in_vain_is_stopped_unless_another_uses_it(tmp_path: Path) -> None:
    home = tmp_path / "a home"
    first = start_server(home=home)
    second = start_server(home=home)
    first.stop_if_spawned()
    assert running_server(home=home) is not None
    second.stop_if_spawned()
    assert running_server(home=home) is not None
    assert stop_server(home=home)
    start_server(home=home).stop_if_spawned()
    assert running_server(home=home) is None


def test_stop_server_ends_one_that_is_still_starting(home: Path) -> None:
    with start_server(home=home):
        pid = state(home)["pid"]
        os.kill(pid, 0)
        assert stop_server(home=home)
        assert running_server(home=home) is None
        assert not stop_server(home=home)
    assert not Path(f"/proc/{pid}/cmdline").exists() or Path(f"/proc/{pid}/cmdline").read_bytes() == b""


def test_a_server_that_stays_away_as_prefect_asks_its_version_is_a_typed_error():
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        began = time.monotonic()
        with pytest.raises(TrackingError, match="Failed to reach API"):
            meet_server(timeout_s=0.5)
        assert time.monotonic() - began > 0.5
