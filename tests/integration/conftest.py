"""Targets for the tests: the loopback server, and a private OpenSSH server with its own port and keys."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jetway.configs.schema import Target
from jetway.tasks.target.agent import ON_DEVICE
from jetway.tasks.target.session import TargetSession, open_target

#: A verb for tests, packed into the agent beside the real ones.
TRIAL_VERB = """
import ctypes, os, resource, signal, subprocess, sys, time
from jetway.tasks.on_device import errors


def run(request, progress):
    with open(request.get("count_file", os.devnull), "a") as file:
        file.write("run\\n")
    if "child" in request:
        subprocess.Popen(["sleep", request["child"]])
    for step in range(request.get("steps", 0)):
        progress({"done": step, "total": request["steps"]})
        time.sleep(request.get("step_s", 0))
    return globals()["do_" + request.get("do", "nothing")](request)


def do_nothing(request):
    return {"ended_at": time.time(), "work_dir": request["work_dir"], "folder": os.getcwd()}


def do_print(request):
    print("noise on stdout")
    sys.stderr.write("noise on stderr\\n")
    return {"version": list(sys.version_info[:3])}


def do_raise(request):
    raise errors.DeviceError("as asked", kind=request["kind"], cause=request.get("cause", "unknown"))


def do_crash(request):
    os.kill(os.getpid(), getattr(signal, request["signal"]))
    time.sleep(10)


def do_exit(request):
    os._exit(3)


def do_bug(request):
    return request["no such key"]


def do_hog(request):
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    return len(bytearray(2 << 30))


def do_large(request):
    return {"values": list(range(request["count"]))}
"""


@pytest.fixture(scope="session")
def target_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jetway home")


@pytest.fixture
def jetway_home(target_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A JETWAY_HOME with a space in it, shared so that the tests share one loopback server."""
    monkeypatch.setenv("JETWAY_HOME", str(target_home))
    return target_home


@pytest.fixture(scope="session")
def agent_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agent") / "on_device"
    shutil.copytree(ON_DEVICE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "trial.py").write_text(TRIAL_VERB)
    return folder


@dataclass
class Sshd:
    """A running private OpenSSH server."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    def target(self, **changes: object) -> Target:
        values: dict[str, object] = {
            "name": "openssh",
            "host": "127.0.0.1",
            "port": self.port,
            "user": getpass.getuser(),
            "identity_file": str(self.folder / "user_key"),
            "known_hosts": str(self.folder / "known_hosts"),
            "work_dir": str(self.folder / "work dir"),
            "orphan_grace_s": 5,
        }
        return Target.model_validate(values | changes)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_key(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path.with_name(path.name + ".pub").read_text()


def start_sshd(folder: Path, extra: str = "", port: int | None = None) -> Sshd:
    """Starts a server in ``folder``; keys that are there already are used again."""
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if server is None:
        pytest.skip("needs OpenSSH's server (apt-get install openssh-server)")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host_key", "user_key"):
        if not (folder / name).exists():
            make_key(folder / name)
    port = port or free_port()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}")
    (folder / "sshd_config").write_text(
        f'Port {port}\nListenAddress 127.0.0.1\nHostKey "{folder}/host_key"\n'
        f'AuthorizedKeysFile "{folder}/user_key.pub"\nStrictModes no\nPidFile none\nUsePAM no\n'
        f"MaxStartups 100\n{extra}\n"
    )
    process = subprocess.Popen(
        [server, "-D", "-f", str(folder / "sshd_config")], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    sshd = Sshd(folder, port, process)
    wait_for(lambda: is_open(port))
    return sshd


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def processes() -> Callable[[str], list[str]]:
    """Finds the command lines of live processes, but this one, that hold a word."""

    def find(word: str) -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if word in text and path.parts[2] != str(os.getpid()):
                found.append(text)
        return found

    return find


@pytest.fixture
def wait_for_end(processes: Callable[[str], list[str]]) -> Callable[[str, float], None]:
    """Waits until no live process holds the word."""

    def wait(word: str, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while left := processes(word):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    return wait


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    server = start_sshd(tmp_path_factory.mktemp("ssh d"))
    yield server
    server.process.terminate()
    server.process.wait()


@pytest.fixture(scope="session")
def noisy_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """Its login says much, in no known encoding, and without a newline at the end."""
    noise = r"""ForceCommand printf 'Welcome \377\376!\n{"size": 1}\n> '; eval "$SSH_ORIGINAL_COMMAND" """
    server = start_sshd(tmp_path_factory.mktemp("noisy"), noise)
    yield server
    server.process.terminate()
    server.process.wait()


@pytest.fixture
def new_sshd(tmp_path: Path) -> Iterator[Callable[..., Sshd]]:
    """Starts servers that the test may stop or change."""
    servers: list[Sshd] = []

    def start(extra: str = "", port: int | None = None) -> Sshd:
        servers.append(start_sshd(tmp_path, extra, port))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.fixture(params=["loopback", "openssh"])
def target(request: pytest.FixtureRequest, jetway_home: Path) -> Target:
    """Both kinds, so that each test runs against both."""
    if request.param == "loopback":
        return Target(name="loopback", kind="loopback", orphan_grace_s=5)
    server: Sshd = request.getfixturevalue("sshd")
    return server.target()


@pytest.fixture
def session(target: Target, agent_folder: Path) -> Iterator[TargetSession]:
    with open_target(target, agent_folder=agent_folder) as session:
        yield session


@pytest.fixture
def ssh_session(sshd: Sshd, jetway_home: Path, agent_folder: Path) -> Iterator[TargetSession]:
    """OpenSSH alone, for what happens on the target and not between the two."""
    with open_target(sshd.target(), agent_folder=agent_folder) as session:
        yield session
