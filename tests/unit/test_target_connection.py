from __future__ import annotations

import errno
import inspect
import shlex
import socket
import subprocess
from pathlib import Path

import paramiko
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetway.configs.schema import Target
from jetway.tasks.errors import ConfigError, HostKeyError, TargetError, TargetUnreachableError
from jetway.tasks.target import connection
from jetway.tasks.target.connection import WatchedSocket, translate
from jetway.tasks.target.process import command_line, parse_record, quote, readable
from jetway.tasks.target.trust import HostKey, fetch_host_key, record_host_key

TARGET = Target(name="bench", host="bench.example", user="me")
KEY = paramiko.ECDSAKey.generate()
VENDOR_ERRORS = [
    found for _, found in inspect.getmembers(paramiko.ssh_exception, inspect.isclass)
    if found.__module__ == paramiko.ssh_exception.__name__
]  # fmt: skip
ARGUMENTS = {
    "BadAuthenticationType": ("no", ["publickey"]),
    "PartialAuthentication": (["publickey"],),
    "ChannelException": (1, "administratively prohibited"),
    "BadHostKeyException": ("bench.example", KEY, KEY),
    "ProxyCommandFailure": ("nc", 1),
    "NoValidConnectionsError": ({("10.0.0.1", 22): ConnectionRefusedError("refused")},),
}


@pytest.mark.parametrize("vendor", VENDOR_ERRORS, ids=lambda vendor: vendor.__name__)
def test_every_paramiko_error_is_translated(vendor: type[Exception]) -> None:
    error = translate(vendor(*ARGUMENTS.get(vendor.__name__, ("why",))), TARGET)
    assert isinstance(error, TargetError | ConfigError)
    assert "bench" in str(error)


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (paramiko.AuthenticationException("no"), TargetError),
        (paramiko.BadHostKeyException("bench.example", KEY, KEY), HostKeyError),
        (paramiko.SSHException("Error reading SSH protocol banner"), TargetUnreachableError),
        (ConnectionResetError("reset"), TargetUnreachableError),
        (TimeoutError(), TargetUnreachableError),
        (EOFError(), TargetUnreachableError),
    ],
)
def test_only_a_lost_link_is_worth_a_retry(exc: Exception, expected: type[Exception]) -> None:
    assert type(translate(exc, TARGET)) is expected


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1))
def test_quoted_words_come_back_from_a_shell_parser(words: list[str]) -> None:
    assert shlex.split(command_line(words)) == words


def test_assignments_are_quoted_too() -> None:
    assert subprocess.run(["sh", "-c", quote("A=b")], capture_output=True).returncode == 127


def test_nul_is_refused() -> None:
    with pytest.raises(ConfigError, match="NUL"):
        quote("a\0")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'\x1e{"a": 1}', {"a": 1}),
        (b'Welcome \xff> \x1e{"a": 1}', {"a": 1}),
        (b'{"a": 1}', None),
        (b"\x1enot json", None),
        (b"\x1e[1]", None),
        (b"", None),
    ],
)
def test_records_are_found_among_noise(line: bytes, expected: object) -> None:
    assert parse_record(line) == expected


def test_readable_drops_what_a_terminal_would_obey() -> None:
    assert readable(b"\x1b[31mred\xff\r\n\x07ok") == "[31mred\ufffd\nok"


def test_loopback_needs_no_trust() -> None:
    with pytest.raises(ConfigError, match="Nothing needs to be trusted"):
        fetch_host_key(Target(name="loopback", kind="loopback"))


def test_recording_a_key_replaces_the_host_s_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JETWAY_HOME", str(tmp_path / "home"))
    other = HostKey("other", "ssh-rsa", "SHA256:x", "AAAA")
    for key in (
        HostKey("[h]:1", "ssh-rsa", "SHA256:x", "AAAA"),
        other,
        HostKey("[h]:1", "ssh-rsa", "y", "BBBB"),
    ):
        path = record_host_key(key)
    assert path.read_text() == "other ssh-rsa AAAA\n[h]:1 ssh-rsa BBBB\n"
    assert [child.name for child in path.parent.iterdir()] == ["known_hosts"]


def test_silence_is_an_error_as_paramiko_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread reads the number of an error of the socket, and dies with a traceback where there is none."""
    monkeypatch.setattr(connection, "SILENCE_S", 0)
    ours, peer = socket.socketpair()
    with ours, peer:
        ours.settimeout(0.01)
        with pytest.raises(ConnectionError, match="nothing heard") as caught:
            WatchedSocket(ours).recv(1)
    assert caught.value.errno == errno.ETIMEDOUT
