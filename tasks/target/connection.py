"""The SSH connection to a target, and the one place where a vendor's exception becomes ours."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import fabric
import paramiko

from jetway.configs.schema import Target
from jetway.tasks.errors import (
    ConfigError,
    HostKeyError,
    JetwayError,
    TargetError,
    TargetUnreachableError,
)
from jetway.tasks.store import jetway_home
from jetway.tasks.target.process import CommandResult, RemoteProcess, command_line

CONNECT_TIMEOUT_S = 10.0
#: A question to the server this often, and the silence after which the link counts as dead.
PULSE_S = 3.0
SILENCE_S = 10.0
#: After its time a command gets SIGTERM, and this much later SIGKILL.
KILL_AFTER_S = 5
#: Room for the target's own ``timeout`` to act before ours does.
TIMEOUT_SLACK_S = KILL_AFTER_S + 5

CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr")

# A Fabric or SSH timeout leaves the command running, so the target stops it itself where it can.
LIMIT_SCRIPT = (
    f'if timeout -k 1 1 true >/dev/null 2>&1; then exec timeout -k {KILL_AFTER_S} "$@"; fi; shift; exec "$@"'
)

# What paramiko logs is also raised, and is told to the user once, in our words.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)


class Connection:
    """An SSH connection that opens when it is first used.

    Create it, run commands, close it; ``with`` closes. Commands of several threads share the link. Unknown
    and changed host keys are refused. A silent peer is noticed within SILENCE_S + PULSE_S.
    """

    def __init__(
        self,
        target: Target,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        unknown_host_key: paramiko.MissingHostKeyPolicy | None = None,
    ) -> None:
        self.target = target
        self._connect_timeout_s = connect_timeout_s
        self._unknown_host_key = unknown_host_key
        self._fabric: fabric.Connection | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> paramiko.Transport:
        """Connects unless connected. Raises HostKeyError, TargetUnreachableError or TargetError."""
        with self._lock, translated(self.target):
            if self._fabric is None or not self._fabric.is_connected:
                self._close()
                self._fabric = self._dial()
            return self._fabric.transport

    def close(self) -> None:
        with self._lock:
            self._close()

    def start(self, argv: Sequence[str]) -> RemoteProcess:
        """Starts a command. Its words are quoted; none reaches a shell as anything but itself."""
        transport = self.open()
        line = command_line(argv)
        with translated(self.target):
            channel = transport.open_session(timeout=SILENCE_S)
            channel.exec_command(line)
        return RemoteProcess(channel, argv, self.target.name, lambda: translated(self.target))

    def run(
        self, argv: Sequence[str], *, timeout_s: float, stdin: bytes = b"", check: bool = True
    ) -> CommandResult:
        """Runs a command to its end.

        Raises TargetTimeoutError after ``timeout_s``, TargetUnreachableError when the link dies, and with
        ``check`` RemoteCommandError when it fails.
        """
        started = time.monotonic()
        limited = ["sh", "-c", LIMIT_SCRIPT, "jetway", f"{timeout_s:g}", *argv]
        with self.start(limited) as process:
            process.argv = tuple(argv)
            try:
                result = process.communicate(stdin, timeout_s + TIMEOUT_SLACK_S)
            except TimeoutError as exc:
                raise process.timed_out(timeout_s) from exc
            if result.exit_status in (124, 137, -1) and time.monotonic() - started >= timeout_s:
                raise process.timed_out(timeout_s)
            if check and result.exit_status != 0:
                raise process.failed(result.exit_status)
        return result

    def _dial(self) -> fabric.Connection:
        connection = self._fabric_connection()
        try:
            self._guard(connection)
            connection.open()
        except BaseException:
            close_fabric(connection)
            raise
        threading.Thread(target=pulse, args=(connection.transport,), daemon=True).start()
        return connection

    def _fabric_connection(self) -> fabric.Connection:
        options = {
            "transport_factory": make_transport,
            "banner_timeout": self._connect_timeout_s,
            "auth_timeout": self._connect_timeout_s,
        }
        target = self.target
        try:
            return fabric.Connection(
                target.host,
                user=target.user,
                # A port that the target file leaves out may come from ~/.ssh/config.
                port=target.port if "port" in target.model_fields_set else None,
                connect_timeout=self._connect_timeout_s,
                connect_kwargs=options | self._authentication(),
            )
        except ValueError as exc:
            raise ConfigError(
                f"{target.name}: host {target.host!r} cannot be used ({exc}). Give the name or address "
                "alone, and the port as port."
            ) from exc

    def _guard(self, connection: fabric.Connection) -> None:
        """Fabric accepts any host key; neither the target nor a jump host may profit from that."""
        connection.client.set_missing_host_key_policy(
            self._unknown_host_key or RefuseUnknownHostKey(self.target)
        )
        if self._unknown_host_key is None:
            load_known_hosts(connection.client, self.target)
        for jump_host in jump_hosts(connection):
            jump_host.client.set_missing_host_key_policy(RefuseUnknownHostKey(self.target))
            load_known_hosts(jump_host.client, self.target)

    def _authentication(self) -> dict[str, Any]:
        if self.target.identity_file is None:
            return {}
        return {"pkey": load_identity(self.target), "allow_agent": False, "look_for_keys": False}

    def _close(self) -> None:
        if self._fabric is not None:
            close_fabric(self._fabric)
            self._fabric = None


def jump_hosts(connection: fabric.Connection) -> Iterator[fabric.Connection]:
    """The connections that this one goes through, as ~/.ssh/config has it (ProxyJump)."""
    while isinstance(connection.gateway, fabric.Connection):
        connection = connection.gateway
        yield connection


def close_fabric(connection: fabric.Connection) -> None:
    """Also when it never came to be open, which Fabric's own close leaves as it is."""
    for hop in (connection, *jump_hosts(connection)):
        hop.client.close()


class WatchedSocket:
    """A socket that fails when the peer has been silent for too long.

    Paramiko reads in a thread of its own, with a short timeout, so the check runs there many times a second.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._heard = time.monotonic()

    def recv(self, size: int) -> bytes:
        try:
            data = self._sock.recv(size)
        except TimeoutError:
            if time.monotonic() - self._heard > SILENCE_S:
                raise ConnectionError(errno.ETIMEDOUT, f"nothing heard for {SILENCE_S:g} s") from None
            raise
        self._heard = time.monotonic()
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def make_transport(sock: socket.socket, **options: Any) -> paramiko.Transport:
    transport = paramiko.Transport(WatchedSocket(sock), **options)
    known = transport.get_security_options().ciphers
    transport.get_security_options().ciphers = [name for name in CIPHERS if name in known]
    return transport


def pulse(transport: paramiko.Transport) -> None:
    """Asks the server for a sign of life until the connection ends. Paramiko's keepalive wants no answer."""
    try:
        while transport.is_active():
            transport.global_request("keepalive@openssh.com")
            time.sleep(PULSE_S)
    except (paramiko.SSHException, OSError, EOFError):
        pass  # the connection ended meanwhile, and whoever uses it hears so


class RefuseUnknownHostKey(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]
    def __init__(self, target: Target) -> None:
        self._target = target

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        raise HostKeyError(
            f"{self._target.name}: the host key of {hostname} is not known "
            f"({key.get_name()} {key.fingerprint}). Compare that fingerprint with the machine's own, "
            f"then record it: jetway trust {self._target.name}"
        )


def recorded_hosts() -> Path:
    """The file that ``jetway trust`` writes."""
    return jetway_home() / "known_hosts"


def known_hosts_files(target: Target) -> list[Path]:
    """What was trusted last comes first, so that it wins over an older entry."""
    own = [Path(target.known_hosts)] if target.known_hosts is not None else []
    return [path.expanduser() for path in (recorded_hosts(), *own, Path("~/.ssh/known_hosts"))]


def load_known_hosts(client: paramiko.SSHClient, target: Target) -> None:
    for path in known_hosts_files(target):
        if path.is_file():
            client.load_system_host_keys(str(path))


def load_identity(target: Target) -> paramiko.PKey:
    path = Path(str(target.identity_file)).expanduser()
    try:
        return paramiko.PKey.from_path(path)
    except FileNotFoundError as exc:
        problem = "does not exist. Set identity_file of the target to a private key"
        raise ConfigError(f"{target.name}: identity_file {path} {problem}.") from exc
    except (paramiko.PasswordRequiredException, TypeError) as exc:
        problem = "has a passphrase. Add it to your SSH agent (ssh-add) and leave identity_file out"
        raise ConfigError(f"{target.name}: identity_file {path} {problem}.") from exc
    except (paramiko.SSHException, paramiko.pkey.UnknownKeyType, ValueError, OSError) as exc:
        problem = f"is not a private key that can be read ({exc}). Make one with ssh-keygen -t ed25519"
        raise ConfigError(f"{target.name}: identity_file {path} {problem}.") from exc


@contextmanager
def translated(target: Target) -> Iterator[None]:
    """Turns what paramiko and the socket raise into errors of our tree."""
    try:
        yield
    except JetwayError:
        raise
    except (paramiko.SSHException, OSError, EOFError) as exc:
        raise translate(exc, target) from exc


def translate(exc: Exception, target: Target) -> JetwayError:
    """Our error for paramiko's, the more special first. What is not listed is a lost connection."""
    where = f"{target.user + '@' if target.user else ''}{target.host}:{target.port}"
    name = target.name
    match exc:
        case paramiko.BadHostKeyException():
            return HostKeyError(
                f"{name}: the host key of {where} has changed. Recorded: {exc.expected_key.get_name()} "
                f"{exc.expected_key.fingerprint}. Now: {exc.key.get_name()} {exc.key.fingerprint}. If the "
                f"machine was set up anew, record the new key: jetway trust {name}. If not, somebody may be "
                "listening: do not connect."
            )
        case paramiko.AuthenticationException():
            return TargetError(
                f"{name}: {where} refused the login with {describe_identity(target)} ({exc}). Put "
                "the public key into ~/.ssh/authorized_keys there (ssh-copy-id), or set user and "
                f"identity_file of {name}."
            )
        case paramiko.ConfigParseError():
            return ConfigError(f"{name}: your ~/.ssh/config cannot be read ({exc}). Fix that line.")
        case paramiko.ssh_exception.IncompatiblePeer():
            return TargetError(
                f"{name}: {where} shares no algorithm with us ({exc}). Update its SSH server, or allow an "
                "AES-GCM or AES-CTR cipher there."
            )
        case paramiko.ChannelException():
            return TargetUnreachableError(
                f"{name}: {where} refused another session ({exc.text}). Close other sessions there, or raise "
                "MaxSessions in its sshd_config."
            )
        case TimeoutError():
            return TargetUnreachableError(
                f"{name}: no answer from {where} in time. Check that the machine is on, and the network."
            )
        case _:
            return TargetUnreachableError(
                f"{name}: cannot reach {where} ({describe(exc)}). Check host and port of the target, that "
                "the machine is on, and that its SSH server runs."
            )


def describe(exc: Exception) -> str:
    if isinstance(exc, paramiko.ssh_exception.NoValidConnectionsError):
        return "; ".join(str(cause) for cause in exc.errors.values())
    return str(exc) or type(exc).__name__


def describe_identity(target: Target) -> str:
    if target.identity_file is not None:
        return f"the key {target.identity_file}"
    return "the keys of your SSH agent and of ~/.ssh"
