"""A command that runs on a target: bytes in, bytes out, and how it ended."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import paramiko

from jetway.tasks.errors import ConfigError, RemoteCommandError, TargetTimeoutError, TargetUnreachableError

#: More output than this is read, so that the command can end, and dropped.
OUTPUT_LIMIT_BYTES = 16 << 20
#: Marks our own JSON lines (RFC 7464) among what login scripts and libraries print.
RECORD_SEPARATOR = b"\x1e"
BLOCK_BYTES = 1 << 16

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class CommandResult:
    """What a command was asked to do, and what came of it."""

    argv: tuple[str, ...]
    exit_status: int
    #: At most OUTPUT_LIMIT_BYTES each; ``truncated`` says that there was more.
    stdout: bytes
    stderr: bytes
    truncated: bool

    @property
    def text(self) -> str:
        return readable(self.stdout)


def readable(data: bytes) -> str:
    """Text of any bytes, safe to show on a terminal."""
    return _CONTROL.sub("", data.decode("utf-8", errors="replace"))


def quote(value: str) -> str:
    """One word for a POSIX shell, always in quotes: ``a=b`` must not become an assignment."""
    if "\0" in value:
        raise ConfigError(f"{value!r} holds a NUL character, which no command can take. Remove it.")
    return "'" + value.replace("'", "'\"'\"'") + "'"


def command_line(argv: Sequence[str]) -> str:
    return " ".join(quote(word) for word in argv)


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The JSON object of one of our lines; None for anybody else's."""
    _, separator, text = line.rpartition(RECORD_SEPARATOR)
    if not separator:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


class Output:
    """Bytes kept up to a limit, from the end or from the beginning."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.kept = bytearray()
        self.truncated = False

    def add(self, data: bytes) -> None:
        room = self.limit_bytes - len(self.kept)
        self.kept += data[:room]
        self.truncated = self.truncated or len(data) > room


class RemoteProcess:
    """A running command. Use it in ``with``: leaving closes its stdin and drops what it still says.

    ``translated`` turns a vendor's exception into ours.
    """

    def __init__(
        self,
        channel: paramiko.Channel,
        argv: Sequence[str],
        target_name: str,
        translated: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.argv = tuple(argv)
        self._channel = channel
        self._target_name = target_name
        self._translated = translated
        self._buffer = bytearray()
        self._errors = Output(OUTPUT_LIMIT_BYTES)
        self._drain = threading.Thread(target=self._read_errors, daemon=True)
        self._drain.start()

    def __enter__(self) -> RemoteProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with suppress(EOFError, OSError, paramiko.SSHException):  # of a link that is gone already
            self._channel.close()
        self._drain.join(timeout=5)

    def write(self, data: bytes) -> None:
        with self._translated():
            self._channel.sendall(data)

    def close_stdin(self) -> None:
        with self._translated():
            self._channel.shutdown_write()

    def read(self, timeout_s: float | None = None) -> bytes:
        """Some bytes of stdout; none at its end. Raises TimeoutError when nothing comes in time."""
        if self._buffer:
            data, self._buffer = bytes(self._buffer), bytearray()
            return data
        self._channel.settimeout(timeout_s)
        try:
            return bytes(self._channel.recv(BLOCK_BYTES))
        except TimeoutError:
            raise
        except (EOFError, OSError, paramiko.SSHException):  # receiving also tells the peer how much has come
            with self._translated():
                raise

    def read_record(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The next of our JSON lines, skipping others; None at the end of stdout."""
        while True:
            end = self._buffer.find(b"\n")
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                record = parse_record(line)
                if record is not None:
                    return record
                continue
            held, self._buffer = self._buffer, bytearray()
            try:
                data = self.read(timeout_s)
            except TimeoutError:
                self._buffer = held
                raise
            if not data:
                return None
            self._buffer = held + data

    def wait(self) -> int:
        """Exit status; -1 when a signal ended the command. Raises TargetUnreachableError on a lost link."""
        status = int(self._channel.recv_exit_status())
        if status < 0 and not self._channel.get_transport().is_active():
            raise TargetUnreachableError(
                f"{self._target_name}: the connection was lost while {self.argv[0]} ran. "
                "Check the network and the target's power, then run again."
            )
        return status

    def communicate(self, stdin: bytes, timeout_s: float) -> CommandResult:
        """Sends stdin, reads everything, and waits. Raises TimeoutError after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        output = Output(OUTPUT_LIMIT_BYTES)
        self._channel.settimeout(timeout_s)
        self._send_input(stdin)
        while data := self.read(max(0.001, deadline - time.monotonic())):
            output.add(data)
        status = self.wait()
        self._drain.join(timeout=5)
        return CommandResult(
            argv=self.argv,
            exit_status=status,
            stdout=bytes(output.kept),
            stderr=self.stderr,
            truncated=output.truncated or self._errors.truncated,
        )

    @property
    def stderr(self) -> bytes:
        return bytes(self._errors.kept)

    def timed_out(self, timeout_s: float) -> TargetTimeoutError:
        return TargetTimeoutError(
            f"{self._target_name}: {self.argv[0]} did not end within {timeout_s:g} s and was stopped. "
            "Look at the target's load, or raise the stage's timeout_s."
        )

    def failed(self, status: int) -> RemoteCommandError:
        """The error for a command that should have succeeded."""
        tail = readable(self.stderr[-2000:]).strip()
        how = {127: "was not found", 126: "cannot be executed", -1: "was killed by a signal"}
        return RemoteCommandError(
            f"{self._target_name}: {self.argv[0]} {how.get(status, f'failed (exit {status})')}"
            + (f": {tail}" if tail else "."),
            exit_status=status,
            stderr=tail,
        )

    def _send_input(self, stdin: bytes) -> None:
        """A command may end without reading its input; how it ended then says more than the broken pipe."""
        try:
            self._channel.sendall(stdin)
            self._channel.shutdown_write()
        except TimeoutError:
            raise
        except OSError:
            pass

    def _read_errors(self) -> None:
        with suppress(EOFError, OSError, paramiko.SSHException):  # read() tells of a lost link
            while data := self._channel.recv_stderr(BLOCK_BYTES):
                self._errors.add(data)
