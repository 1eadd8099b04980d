from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jetway.configs import targets
from jetway.configs.schema import Target
from jetway.tasks.errors import TargetError
from jetway.tasks.target import loopback
from jetway.tasks.target.connection import Connection
from jetway.tasks.target.loopback import LoopbackServer
from jetway.tasks.target.session import TargetSession, as_ssh_host, open_target

PYTHONS = [
    pytest.param(str(found), id=found.parents[1].name)
    for series in ("3.6", "3.8", "3.10", "3.12")
    for found in sorted(Path("~/.pyenv/versions").expanduser().glob(f"{series}.*/bin/python3"))[:1]
]

USE = """
import sys
from jetway.configs.schema import Target
from jetway.tasks.target.session import open_target
with open_target(Target(name="loopback", kind="loopback")) as session:
    print(session.target.identity_file, session.target.port, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _home(jetway_home: Path) -> None:
    pass


def start_user() -> tuple[subprocess.Popen[str], Path]:
    """A process with a session, which it keeps until its input ends."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", USE], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    keys = Path(process.stdout.readline().rpartition(" ")[0]).parent
    assert keys.exists()
    return process, keys


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def servers() -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"jetway.tasks.target.loopback_server" in path.read_bytes():
                found.add(int(path.parts[2]))
        except OSError:
            continue
    return found


def test_server_starts_soon(tmp_path: Path) -> None:
    started = time.monotonic()
    server = LoopbackServer(tmp_path / "home")
    assert time.monotonic() - started < 3
    server.stop()
    assert not server.is_running()


def test_a_normal_end_is_silent_and_leaves_nothing(jetway_home: Path) -> None:
    process, keys = start_user()
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (0, "", "")
    assert not keys.exists()


def test_server_ends_with_a_killed_process() -> None:
    before = servers()
    process, keys = start_user()
    (server,) = servers() - before
    process.kill()
    process.communicate()
    wait_for(lambda: not Path(f"/proc/{server}").exists() and not keys.exists(), 5)


def test_keys_are_private_and_only_they_open_it(tmp_path: Path) -> None:
    host = as_ssh_host(Target(name="loopback", kind="loopback"))
    key = Path(str(host.identity_file))
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    other = host.model_copy(update={"identity_file": str(tmp_path / "other")})
    with pytest.raises(TargetError, match="refused the login"), Connection(other) as connection:
        connection.open()


def test_one_server_serves_the_process_and_is_replaced_when_it_dies() -> None:
    target = Target(name="loopback", kind="loopback")
    first = loopback.resolve(target)
    assert loopback.resolve(target).port == first.port
    os.kill(loopback._servers[os.getpid()]._process.pid, signal.SIGKILL)
    wait_for(lambda: not loopback._servers[os.getpid()].is_running(), 5)
    shutil.rmtree(Path(str(first.identity_file)).parent)
    with open_target(target) as session:
        assert session.connection.run(["echo", "back"], timeout_s=10).text == "back\n"


def test_the_packaged_target_runs_in_its_own_folder(jetway_home: Path) -> None:
    text = (Path(targets.__file__).parent / "loopback.yaml").read_text()
    with open_target(Target.model_validate(yaml.safe_load(text))) as session:
        assert session.connection.run(["pwd"], timeout_s=10).text == f"{jetway_home}/targets/loopback\n"
        python = session.connection.run(["python3", "-c", "import onnxruntime"], timeout_s=60)
    assert python.exit_status == 0


@pytest.mark.parametrize("python", PYTHONS)
def test_jobs_run_under_every_python(python: str, agent_folder: Path) -> None:
    target = Target(name="loopback", kind="loopback", python=python)
    with open_target(target, agent_folder=agent_folder) as session:
        import_all_modules(session)
        result = session.run_job("trial", {"do": "print", "steps": 2}, 20, lease=True)
    assert ".".join(map(str, result["version"])) in python


def import_all_modules(session: TargetSession) -> None:
    code = (
        "import sys, pkgutil, importlib; sys.path.insert(0, sys.argv[1]); "
        "import jetway.tasks.on_device as package; "
        "names = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name != '__main__']; "
        "[importlib.import_module(package.__name__ + '.' + name) for name in names]; print(len(names))"
    )
    command = [session.target.python, "-W", "error", "-I", "-c", code, session._agent()]
    assert int(session.connection.run(command, timeout_s=60).text) >= 6
