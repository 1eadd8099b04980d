from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jetway.configs.schema import Target
from jetway.tasks.errors import (
    BuildError,
    RemoteCommandError,
    TargetBusyError,
    TargetMismatchError,
    TargetTimeoutError,
    TargetUnreachableError,
)
from jetway.tasks.on_device import lease
from jetway.tasks.target import jobs
from jetway.tasks.target.session import TargetSession, open_target

Processes = Callable[[str], list[str]]


@pytest.fixture(autouse=True)
def _home(jetway_home: Path) -> None:
    pass


def run(session: TargetSession, request: dict[str, Any], timeout_s: float = 20, **options: Any) -> Any:
    return session.run_job("trial", request, timeout_s, **({"lease": False} | options))


def test_job_streams_progress_and_leaves_no_folder(session: TargetSession) -> None:
    lines: list[Any] = []
    result = session.run_job("trial", {"steps": 3}, 20, lines.append, lease=False)
    assert lines == [{"done": step, "total": 3} for step in range(3)]
    assert os.path.dirname(result["folder"]) == os.path.join(result["work_dir"], "jobs")
    assert os.listdir(os.path.dirname(result["folder"])) == []


def test_end_is_noticed_at_once(session: TargetSession) -> None:
    delays = []
    for _ in range(3):
        ended_at = run(session, {"steps": 1, "step_s": 0.2})["ended_at"]
        delays.append(time.time() - ended_at)
    assert min(delays) < 0.3


def test_result_may_be_large_and_the_verb_may_print(ssh_session: TargetSession) -> None:
    assert len(run(ssh_session, {"do": "large", "count": 300_000})["values"]) == 300_000
    assert "version" in run(ssh_session, {"do": "print"})
    assert "version" in ssh_session.call("trial", {"do": "print"})


FAILURES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"do": "raise", "kind": "mismatch"}, TargetMismatchError, "as asked"),
    ({"do": "raise", "kind": "build_failed", "cause": "unsupported_operator"}, BuildError, "as asked"),
    ({"do": "bug"}, RemoteCommandError, "KeyError"),
    ({"do": "exit"}, RemoteCommandError, "exit 3"),
    ({"do": "crash", "signal": "SIGSEGV"}, RemoteCommandError, "SIGSEGV"),
    ({"do": "hog"}, RemoteCommandError, "out of memory"),
]


def test_failures_become_named_errors(ssh_session: TargetSession) -> None:
    for request, error, message in FAILURES:
        with pytest.raises(error, match=message):
            run(ssh_session, request)


def test_unknown_verb(ssh_session: TargetSession) -> None:
    with pytest.raises(RemoteCommandError, match="no verb 'nonsense'"):
        ssh_session.call("nonsense", {})


def test_timeout_ends_the_whole_group(session: TargetSession, processes: Processes) -> None:
    with pytest.raises(TargetTimeoutError, match="longer than 1 s"):
        run(session, {"child": "97.11", "steps": 1, "step_s": 60}, timeout_s=1)
    assert not processes("sleep 97.11")


def test_a_child_left_behind_is_ended(ssh_session: TargetSession, processes: Processes) -> None:
    run(ssh_session, {"child": "97.22"})
    assert not processes("sleep 97.22")


def test_an_error_in_the_callback_ends_the_job(ssh_session: TargetSession, processes: Processes) -> None:
    def fail(line: Any) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        ssh_session.run_job("trial", {"child": "97.33", "steps": 1, "step_s": 60}, 90, fail, lease=False)
    assert not processes("sleep 97.33")
    assert_no_job_left(ssh_session)


def test_interrupt_ends_the_jobs_of_other_threads(
    ssh_session: TargetSession, monkeypatch: pytest.MonkeyPatch, processes: Processes
) -> None:
    monkeypatch.setattr(jobs, "_interrupted", threading.Event())
    seen = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        request = {"child": "97.44", "steps": 2, "step_s": 60}
        future = pool.submit(ssh_session.run_job, "trial", request, 90, lambda line: seen.set(), lease=False)
        assert seen.wait(10)
        jobs.interrupt_jobs()
        with pytest.raises(KeyboardInterrupt):
            future.result(20)
    assert not processes("sleep 97.44")
    assert_no_job_left(ssh_session)


def test_a_dropped_connection_attaches_again(session: TargetSession, tmp_path: Path) -> None:
    count = tmp_path / "count"
    lines: list[Any] = []

    def drop(line: Any) -> None:
        lines.append(line)
        if len(lines) in (2, 5):
            session.connection.open().close()

    request = {"count_file": str(count), "steps": 10, "step_s": 0.15}
    session.run_job("trial", request, 20, drop, lease=False)
    assert count.read_text() == "run\n"
    assert [line["done"] for line in lines] == list(range(10))


def test_a_link_down_for_long_is_unreachable(
    sshd: Any, agent_folder: Path, wait_for_end: Callable[[str, float], None]
) -> None:
    with open_target(sshd.target(), agent_folder=agent_folder) as session:

        def cut(line: Any) -> None:
            moved = session.target.model_copy(update={"port": 1})
            session.connection.open().close()
            session.connection.target = moved

        with pytest.raises(TargetUnreachableError, match="cannot reach"):
            session.run_job(
                "trial",
                {"child": "97.55", "steps": 1, "step_s": 60},
                90,
                cut,
                lease=False,
                reconnect_limit_s=1,
            )
    wait_for_end("sleep 97.55", 5)


def test_a_job_whose_host_was_away_too_long(sshd: Any, agent_folder: Path) -> None:
    """The link returns after the grace: the job is gone, and the error says why."""
    with open_target(sshd.target(), agent_folder=agent_folder) as session:

        def freeze(line: Any) -> None:
            time.sleep(6)

        with pytest.raises(TargetUnreachableError, match="orphan_grace_s"):
            session.run_job("trial", {"steps": 1, "step_s": 60}, 90, freeze, lease=False)


@pytest.mark.parametrize(("reboots", "runs"), [(1, 2), (2, 2)])
def test_a_reboot_restarts_the_job_once(
    ssh_session: TargetSession, tmp_path: Path, reboots: int, runs: int
) -> None:
    """A reboot as the job sees it: every process gone at once, and another boot id."""
    count = tmp_path / "count"
    left = [reboots]
    work_dir = Path(ssh_session.call("trial", {})["work_dir"])

    def reboot(line: Any) -> None:
        if left[0] > 0 and "done" in line:
            left[0] -= 1
            (folder,) = (work_dir / "jobs").iterdir()
            (folder / "boot_id").write_text("another boot")
            os.kill(int((folder / "pid").read_text()), signal.SIGKILL)

    request = {"count_file": str(count), "steps": 1, "step_s": 1.5}
    if reboots == 1:
        ssh_session.run_job("trial", request, 20, reboot, lease=False)
    else:
        with pytest.raises(RemoteCommandError, match="rebooted twice"):
            ssh_session.run_job("trial", request, 20, reboot, lease=False)
    assert count.read_text() == "run\n" * runs


def test_a_killed_supervisor_takes_the_worker_along(
    ssh_session: TargetSession, processes: Processes, wait_for_end: Callable[[str, float], None]
) -> None:
    killed: list[str] = []

    def kill(line: Any) -> None:
        (folder,) = (Path(ssh_session.call("trial", {})["work_dir"]) / "jobs").iterdir()
        assert len(processes(folder.name)) == 3  # what follows the job, its supervisor and its worker
        os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
        killed.append(folder.name)

    with pytest.raises(RemoteCommandError, match="killed together with its supervisor"):
        ssh_session.run_job("trial", {"steps": 1, "step_s": 60}, 90, kill, lease=False)
    wait_for_end(killed[0], 5)
    assert_no_job_left(ssh_session)


def test_jobs_take_turns(target: Target, agent_folder: Path) -> None:
    def hold(_: int) -> None:
        with open_target(target, agent_folder=agent_folder) as session:
            session.run_job("trial", {"steps": 2, "step_s": 0.2}, 20)

    began = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(hold, range(3)))
    held = [(start, end) for start, end in held_spans() if start > began and end - start >= 0.4]
    assert len(held) >= 3
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(held))


HOST_SCRIPT = """
import sys, json
from pathlib import Path
from jetway.configs.schema import Target
from jetway.tasks.target.session import open_target
target = Target.model_validate_json(sys.argv[1])
with open_target(target, agent_folder=Path(sys.argv[2])) as session:
    session.run_job("trial", json.loads(sys.argv[3]), 300, lambda line: print(json.dumps(line), flush=True))
"""


@pytest.fixture
def host(target: Target, agent_folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs a job which holds the lease and has a child."""
    request = json.dumps({"child": "97.66", "steps": 100, "step_s": 1})
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HOST_SCRIPT,
            target.model_dump_json(exclude_unset=True),
            str(agent_folder),
            request,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while '"done"' not in process.stdout.readline():
        assert process.poll() is None
    yield process
    process.kill()
    process.communicate()


def test_busy_accelerator_names_its_holder(
    host: subprocess.Popen[str], target: Target, agent_folder: Path
) -> None:
    holder = lease.read_holder(lease.lease_path("cpu", lease.directory()))
    assert holder is not None
    assert f"process {host.pid}-" in holder["owner"]
    named = rf"{holder['job']} of {holder['owner']} \(pid {holder['pid']}.*since"
    impatient = target.model_copy(update={"busy_timeout_s": 0.5})
    with open_target(impatient, agent_folder=agent_folder) as session:
        with pytest.raises(TargetBusyError, match=named):
            session.run_job("trial", {}, 20)
        assert session.call("trial", {})["work_dir"]


def test_kill_of_the_host_leaves_nothing_after_the_grace(
    host: subprocess.Popen[str], target: Target, processes: Processes
) -> None:
    owner = lease.read_holder(lease.lease_path("cpu", lease.directory()))
    assert owner is not None
    assert processes("sleep 97.66")
    assert processes(owner["job"])
    host.kill()
    killed = time.monotonic()
    while processes("sleep 97.66") or processes(owner["job"]) or is_held_by(owner["job"]):
        assert time.monotonic() - killed < target.orphan_grace_s
        time.sleep(0.05)


def test_ctrl_c_leaves_nothing_at_once(
    host: subprocess.Popen[str], session: TargetSession, processes: Processes
) -> None:
    owner = lease.read_holder(lease.lease_path("cpu", lease.directory()))
    assert owner is not None
    os.killpg(host.pid, signal.SIGINT)
    _, errors = host.communicate(timeout=10)
    assert "KeyboardInterrupt" in errors
    assert not is_held_by(owner["job"])
    assert not processes(owner["job"])
    assert not processes("sleep 97.66")
    assert_no_job_left(session)


def is_held_by(job: str) -> bool:
    owner = lease.read_holder(lease.lease_path("cpu", lease.directory()))
    return owner is not None and owner.get("job") == job


def held_spans() -> list[tuple[float, float]]:
    """When the lease was held, by its own log."""
    log = Path(lease.lease_path("cpu", lease.directory()) + ".log")
    spans, began = [], None
    for line in log.read_text().splitlines():
        record = json.loads(line)
        if record["event"] == "acquire":
            began = record["monotonic_s"]
        elif began is not None:
            spans.append((began, record["monotonic_s"]))
            began = None
    return spans


def assert_no_job_left(session: TargetSession) -> None:
    assert os.listdir(Path(session.call("trial", {})["work_dir"]) / "jobs") == []
