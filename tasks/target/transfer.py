"""Files to and from a target, by content: never sent twice, never half there, always checked.

A file goes through the stdin of one command, which hashes it as it comes: over one connection that is faster
than SFTP, whose every block waits for paramiko's bookkeeping. On the target a file of the right name and size
counts as there; its digest was checked when it was stored, and the job that uses it checks it again. So
pushing an unchanged file takes one short command, whatever its size.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from jetway.configs.schema import Target
from jetway.tasks.artifacts import file_sha256
from jetway.tasks.errors import (
    ArtifactError,
    RemoteCommandError,
    TargetMismatchError,
    TargetUnreachableError,
)
from jetway.tasks.target.agent import ON_DEVICE
from jetway.tasks.target.connection import Connection
from jetway.tasks.target.process import RemoteProcess, readable

T = TypeVar("T")
#: Bytes done and in all.
TransferProgress = Callable[[int, int], None]

#: What fits into one SSH packet, so that paramiko need not cut it up.
BLOCK_BYTES = 32_704
REPORT_BYTES = 1 << 20
RETRY_PAUSES_S = (0.5, 1.0, 2.0, 4.0)

# An old Python cannot parse the receiver; it can parse this, and say so.
BOOTSTRAP = (
    "import sys\n"
    "if sys.version_info < (3, 6): sys.exit('needs Python 3.6 or newer, this is ' + sys.version.split()[0])\n"
    "exec(compile(sys.argv.pop(1), 'transfer.py', 'exec'))\n"
)


class Transfer:
    """Moves files over a connection; a drop is mended, and the file resumed, a few times."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._target = connection.target
        self._source = (ON_DEVICE / "transfer.py").read_text()

    def push(self, path: Path, sha256: str, size_bytes: int, progress: TransferProgress | None = None) -> str:
        """Puts a file among the target's blobs and returns its path there.

        Raises ArtifactError when the file is not what its digest says, RemoteCommandError when the target's
        disk is full or not writable, TargetUnreachableError when the link stays down.
        """
        with path.open("rb") as file:
            return self._push(file, sha256, size_bytes, progress, str(path))

    def push_bytes(self, data: bytes) -> str:
        return self._push(io.BytesIO(data), hashlib.sha256(data).hexdigest(), len(data), None, "the agent")

    def pull(
        self, remote_path: str, local_path: Path, sha256: str, progress: TransferProgress | None = None
    ) -> None:
        """Fetches a file; it gets its name when its digest is right.

        Raises ArtifactError when it is not, RemoteCommandError when it is not there.
        """
        local_path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(
            prefix=local_path.name + ".", suffix=".part", dir=local_path.parent
        )
        try:
            with os.fdopen(descriptor, "wb") as file:
                mended(lambda: self._fetch(remote_path, file, progress))
            if file_sha256(Path(part)) != sha256:
                raise ArtifactError(
                    f"{self._target.name}: {remote_path} does not match its digest {sha256[:12]}, so it was "
                    "not taken. Remove it there and run the pipeline again."
                )
            os.replace(part, local_path)
        finally:
            Path(part).unlink(missing_ok=True)

    def _push(
        self, file: BinaryIO, sha256: str, size: int, progress: TransferProgress | None, name: str
    ) -> str:
        reply = mended(lambda: self._send(file, sha256, size, progress))
        if reply.get("error") == "digest":
            self._blame(file, sha256, name)
            reply = mended(lambda: self._send(file, sha256, size, progress))
        if "path" not in reply:
            self._refuse(reply, name)
        return str(reply["path"])

    def _send(
        self, file: BinaryIO, sha256: str, size: int, progress: TransferProgress | None
    ) -> dict[str, Any]:
        """One attempt: asks how much is there, sends the rest. Returns the receiver's last reply."""
        with self._start("receive", self._target.work_dir, sha256, str(size)) as process:
            reply = self._reply(process)
            if "offset" not in reply:
                return reply
            offset = int(reply["offset"])
            file.seek(offset)
            try:
                self._stream(process, file, offset, size, progress)
            except TargetUnreachableError:
                # The receiver may have gone with a reason, such as a full disk, and said so before.
                last = process.read_record()
                if last is None:
                    raise
                return last
            return self._reply(process)

    def _stream(
        self,
        process: RemoteProcess,
        file: BinaryIO,
        done: int,
        size: int,
        progress: TransferProgress | None,
    ) -> None:
        reported = done
        while block := file.read(BLOCK_BYTES):
            process.write(block)
            done += len(block)
            if progress and (done - reported >= REPORT_BYTES or done >= size):
                reported = done
                progress(done, size)
        process.close_stdin()

    def _fetch(self, remote_path: str, file: BinaryIO, progress: TransferProgress | None) -> None:
        done = file.tell()
        with self._start("send", remote_path, str(done)) as process:
            reply = self._reply(process)
            if "size" not in reply:
                self._refuse(reply, remote_path)
            while data := process.read():
                file.write(data)
                done += len(data)
                if progress:
                    progress(done, int(reply["size"]))
            status = process.wait()
            if status != 0:
                raise process.failed(status)

    def _start(self, command: str, *arguments: str) -> RemoteProcess:
        python = [self._target.python, "-I", "-S", "-c", BOOTSTRAP]
        return self._connection.start([*python, self._source, command, *arguments])

    def _reply(self, process: RemoteProcess) -> dict[str, Any]:
        reply = process.read_record()
        if reply is None:
            status = process.wait()
            if status == 0:
                raise self._lost()
            raise python_error(self._target, self._target.python, status, readable(process.stderr))
        return reply

    def _lost(self) -> TargetUnreachableError:
        return TargetUnreachableError(
            f"{self._target.name}: the connection was lost during a transfer. Run again: it resumes."
        )

    def _blame(self, file: BinaryIO, sha256: str, name: str) -> None:
        """Decides whether it was our file or the transfer that was wrong."""
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:  # type: ignore[arg-type]
            raise ArtifactError(
                f"{name} does not match its digest {sha256[:12]}, so {self._target.name} refused it. "
                "Delete the file and run the pipeline again."
            )

    def _refuse(self, reply: dict[str, Any], name: str) -> NoReturn:
        where = f"{self._target.name}: {name}"
        match reply.get("error"):
            case "disk_full":
                raise RemoteCommandError(
                    f"{where} needs {reply['needed']} bytes in {self._target.work_dir!r}, and "
                    f"{reply['free']} are free. Free some, or set work_dir of the target to a larger disk."
                )
            case "digest":
                raise RemoteCommandError(
                    f"{where} arrived changed twice (as {reply['sha256'][:12]}). Check the target's disk and "
                    "memory, and the network."
                )
            case _:
                raise RemoteCommandError(
                    f"{where}: {reply.get('message', reply)}. Check the path, and that the user may write "
                    f"to work_dir {self._target.work_dir!r}."
                )


def python_error(
    target: Target, python: str, status: int, stderr: str
) -> RemoteCommandError | TargetMismatchError:
    """The error for a program of ours that failed as a whole: most often a Python missing or too old."""
    how = {127: "was not found", 126: "cannot be executed", -1: "was killed by a signal"}
    what = f"{target.name}: {python} {how.get(status, f'failed (exit {status})')}"
    detail = stderr.strip()[-2000:]
    message = f"{what}: {detail}" if detail else f"{what}."
    if status in (126, 127) or "needs Python 3.6" in stderr:
        return TargetMismatchError(f"{message} Set python of {target.name} to a Python 3.6 or newer there.")
    return RemoteCommandError(message, exit_status=status, stderr=detail)


def mended(attempt: Callable[[], T]) -> T:
    """Tries again when the link drops, with growing pauses."""
    for pause_s in RETRY_PAUSES_S:
        try:
            return attempt()
        except TargetUnreachableError:
            time.sleep(pause_s)
    return attempt()
