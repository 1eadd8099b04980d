from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jetway.configs.schema import Target
from jetway.tasks.errors import (
    ConfigError,
    HostKeyError,
    RemoteCommandError,
    TargetError,
    TargetMismatchError,
    TargetTimeoutError,
    TargetUnreachableError,
)
from jetway.tasks.target.connection import Connection
from jetway.tasks.target.session import TargetSession, open_target
from jetway.tasks.target.trust import fetch_host_key, record_host_key

EVIL = [
    "; rm -rf {0}",
    "$(touch {0})",
    "`touch {0}`",
    "a'b\"c",
    "a\nb; touch {0}",
    "&& touch {0}",
    "A=b",
    "-c",
    "~",
]


@pytest.fixture(autouse=True)
def _home(jetway_home: Path) -> None:
    pass


def test_run_returns_output_and_exit_status(session: TargetSession) -> None:
    result = session.connection.run(
        ["sh", "-c", "cat; echo bad >&2; exit 3"], timeout_s=10, stdin=b"in", check=False
    )
    assert (result.exit_status, result.stdout, result.stderr) == (3, b"in", b"bad\n")


def test_run_raises_when_the_command_fails(session: TargetSession) -> None:
    with pytest.raises(RemoteCommandError, match="went wrong") as caught:
        session.connection.run(["sh", "-c", "echo went wrong >&2; exit 5"], timeout_s=10)
    assert caught.value.exit_status == 5


def test_every_word_arrives_as_it_is(session: TargetSession, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    words = [word.format(trap) for word in EVIL]
    result = session.connection.run(["printf", "%s\\0", *words], timeout_s=10)
    assert result.stdout.decode().split("\0")[:-1] == words
    assert not trap.exists()


@pytest.mark.parametrize("evil", EVIL)
def test_evil_python_is_just_a_program_that_is_not_there(sshd: Any, tmp_path: Path, evil: str) -> None:
    trap = tmp_path / "trap"
    with open_target(sshd.target(python=evil.format(trap))) as session, pytest.raises(TargetMismatchError):
        session.call("probe", {})
    assert not trap.exists()


def test_evil_work_dir_is_just_a_folder(sshd: Any, tmp_path: Path, agent_folder: Path) -> None:
    trap = tmp_path / "trap"
    work_dir = str(tmp_path / "; touch trap; $(touch trap) `touch trap` '\"\n& é")
    with open_target(sshd.target(work_dir=work_dir), agent_folder=agent_folder) as session:
        assert session.run_job("trial", {}, 10)["work_dir"] == work_dir
    assert set(os.listdir(work_dir)) == {"blobs", "jobs"}
    assert not trap.exists()
    assert not (Path.home() / "trap").exists()


def test_nul_is_refused(session: TargetSession) -> None:
    with pytest.raises(ConfigError, match="NUL"):
        session.connection.run(["echo", "a\0b"], timeout_s=10)


def test_much_output_is_cut_and_harmless(session: TargetSession) -> None:
    command = ["sh", "-c", "head -c 60000000 /dev/zero; head -c 40000000 /dev/zero >&2; printf '\\377' >&2"]
    result = session.connection.run(command, timeout_s=60)
    assert result.truncated
    assert 0 < len(result.stdout) < 60_000_000


def test_timeout_ends_the_command_on_the_target(
    session: TargetSession, processes: Callable[[str], list[str]]
) -> None:
    started = time.monotonic()
    with pytest.raises(TargetTimeoutError, match="within 1 s"):
        session.connection.run(["sh", "-c", "echo $$ > /dev/stderr; exec sleep 98.7654"], timeout_s=1)
    assert time.monotonic() - started < 5
    # its second began there, which on a busy machine is later than here
    while processes("98.7654"):
        assert time.monotonic() - started < 12
        time.sleep(0.05)


def test_threads_share_a_connection(session: TargetSession) -> None:
    def echo(number: int) -> str:
        return session.connection.run(["echo", str(number)], timeout_s=20).text

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(echo, range(24))) == [f"{number}\n" for number in range(24)]


def test_aes_gcm_is_used(session: TargetSession) -> None:
    assert "gcm" in session.connection.open().local_cipher


def test_wrong_key_names_the_key_and_the_fix(sshd: Any, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    target = sshd.target(identity_file=str(tmp_path / "other"))
    with (
        pytest.raises(TargetError, match=r"other.*authorized_keys") as caught,
        Connection(target) as connection,
    ):
        connection.open()
    assert not isinstance(caught.value, TargetUnreachableError)


def make_key(path: Path, passphrase: str = "") -> None:
    assert os.spawnlp(
        os.P_WAIT, "ssh-keygen", "ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(path)
    ) == 0  # fmt: skip


def test_identity_file_that_cannot_be_used(sshd: Any, tmp_path: Path) -> None:
    make_key(tmp_path / "locked", "secret words")
    (tmp_path / "text").write_text("not a key")
    for name, message in (
        ("missing", "does not exist"),
        ("locked", "passphrase"),
        ("text", "not a private key"),
    ):
        target = sshd.target(identity_file=str(tmp_path / name))
        with pytest.raises(ConfigError, match=message), Connection(target) as connection:
            connection.open()


def test_unknown_host_is_refused_until_trusted(
    sshd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JETWAY_HOME", str(tmp_path))
    target = sshd.target(known_hosts=None)
    with (
        pytest.raises(HostKeyError, match="jetway trust openssh") as caught,
        Connection(target) as connection,
    ):
        connection.open()
    key = fetch_host_key(target)
    assert key.fingerprint in str(caught.value)
    assert key.fingerprint.startswith("SHA256:")
    record_host_key(key)
    with Connection(target) as connection:
        connection.open()


def test_changed_host_key_is_refused_until_trusted(
    new_sshd: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JETWAY_HOME", str(tmp_path / "home"))
    server = new_sshd()
    target = server.target(known_hosts=None)
    old = fetch_host_key(target)
    record_host_key(old)
    server.process.kill()
    server.process.wait()
    (tmp_path / "host_key").unlink()
    new_sshd(port=server.port)
    with pytest.raises(HostKeyError, match="has changed") as caught, Connection(target) as connection:
        connection.open()
    new = fetch_host_key(target)
    assert old.fingerprint in str(caught.value)
    assert new.fingerprint in str(caught.value)
    path = record_host_key(new)
    assert path.read_text() == new.line + "\n"
    with Connection(target) as connection:
        connection.open()


def test_closed_port_is_unreachable() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        target = Target(name="gone", port=holder.getsockname()[1])
        with (
            pytest.raises(TargetUnreachableError, match=f"127.0.0.1:{target.port}"),
            Connection(target) as link,
        ):
            link.open()


def test_name_that_does_not_resolve_is_unreachable() -> None:
    with pytest.raises(TargetUnreachableError, match=r"nowhere\.invalid"), Connection(
        Target(name="gone", host="nowhere.invalid")
    ) as connection:  # fmt: skip
        connection.open()


def test_server_that_says_nothing_is_unreachable() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        target = Target(name="mute", port=mute.getsockname()[1])
        with pytest.raises(TargetUnreachableError), Connection(target, connect_timeout_s=1) as connection:
            connection.open()


def test_silent_peer_is_noticed(new_sshd: Callable[..., Any]) -> None:
    with Connection(new_sshd().target()) as connection:
        server = server_of(connection)
        os.kill(server, signal.SIGSTOP)
        started = time.monotonic()
        try:
            with pytest.raises(TargetUnreachableError):
                connection.run(["sleep", "60"], timeout_s=60)
            assert time.monotonic() - started < 15
        finally:
            os.kill(server, signal.SIGKILL)


def test_lost_connection_opens_again(sshd: Any) -> None:
    with Connection(sshd.target()) as connection:
        server = server_of(connection)
        threading.Timer(0.3, os.kill, (server, signal.SIGKILL)).start()
        with pytest.raises(TargetUnreachableError, match="connection was lost"):
            connection.run(["sleep", "20"], timeout_s=20)
        assert connection.run(["echo", "back"], timeout_s=10).text == "back\n"


def server_of(connection: Connection) -> int:
    """Process id of the sshd that serves this connection."""
    with connection.start(["sh", "-c", "echo $$; cat"]) as process:
        pid = int(process.read())
        while Path(f"/proc/{pid}/comm").read_text().strip() != "sshd":
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid
