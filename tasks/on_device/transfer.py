"""Receives and sends files by their sha256.

The host runs the text of this file with ``python -c``, before any agent is on the target, so it imports
the standard library only. Replies are JSON lines behind a record separator (RFC 7464), which a login
script's chatter cannot be taken for.
"""

import errno
import fcntl
import hashlib
import json
import os
import select
import sys
import time
from typing import Any, List, Tuple

CHUNK_BYTES = 1 << 20
# The host notices a dead link sooner; a receiver that hears nothing this long gives up its lock.
SILENCE_S = 30
# Files up to this size are hashed before they count as stored. Larger ones were hashed when they came,
# are known by name and size, and are hashed again by the job that uses them.
ALWAYS_HASHED_BYTES = 4 << 20
PART_KEPT_S = 24 * 3600
BLOB_KEPT_S = 30 * 24 * 3600


def main(arguments: List[str]) -> int:
    command, rest = arguments[0], arguments[1:]
    try:
        if command == "receive":
            return receive(rest[0], rest[1], int(rest[2]))
        return send(rest[0], int(rest[1]))
    except OSError as exc:
        reply(error="os_error", message=str(exc))
        return 1


def reply(**fields: Any) -> None:
    sys.stdout.buffer.write(b"\x1e" + json.dumps(fields).encode() + b"\n")
    sys.stdout.buffer.flush()


def send(path: str, offset: int) -> int:
    """Writes a line with the file's size, then its bytes from ``offset`` on."""
    with open(path, "rb") as file:
        reply(size=os.fstat(file.fileno()).st_size)
        file.seek(offset)
        for block in iter(lambda: file.read(CHUNK_BYTES), b""):
            sys.stdout.buffer.write(block)
        sys.stdout.buffer.flush()
    return 0


def receive(work_dir: str, sha256: str, size: int) -> int:
    """Stores stdin as ``blobs/<sha256>`` unless it is there.

    It goes to ``<sha256>.part``, which a dropped connection leaves to be resumed, and gets its name when
    its digest is right. There is no fsync: whoever uses a blob checks its digest first.
    """
    folder = os.path.join(os.path.abspath(work_dir), "blobs")
    os.makedirs(folder, exist_ok=True)
    final = os.path.join(folder, sha256)
    if is_stored(final, sha256, size):
        os.utime(final)
        reply(path=final)
        return 0
    sweep(folder)
    part = lock_part(final + ".part")
    try:
        return fill_part(part, final, sha256, size)
    except OSError as exc:
        os.remove(final + ".part")
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        reply(error="disk_full", needed=size, free=free_bytes(folder))
        return 1
    finally:
        os.close(part)


def fill_part(part: int, final: str, sha256: str, size: int) -> int:
    if is_stored(final, sha256, size):  # another push of the same file was first
        os.remove(final + ".part")
        reply(path=final)
        return 0
    digest, offset = hash_part(part, size)
    free = free_bytes(final + ".part")
    if size - offset > free:
        os.remove(final + ".part")
        reply(error="disk_full", needed=size - offset, free=free)
        return 1
    reply(offset=offset)
    while offset < size:
        block = read_some(size - offset)
        if not block:
            return 1
        write_all(part, block)
        digest.update(block)
        offset += len(block)
    if digest.hexdigest() != sha256:
        os.remove(final + ".part")
        reply(error="digest", sha256=digest.hexdigest())
        return 1
    os.rename(final + ".part", final)
    reply(path=final)
    return 0


def lock_part(path: str) -> int:
    """Opens the part and waits while another receiver fills it."""
    while True:
        part = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.fstat(part).st_ino == os.stat(path).st_ino:
                return part
        except BlockingIOError:
            time.sleep(0.1)
        os.close(part)


def hash_part(part: int, size: int) -> Tuple[Any, int]:
    """Digest and length of what an interrupted push left."""
    digest, offset = hashlib.sha256(), 0
    if os.fstat(part).st_size > size:
        os.ftruncate(part, 0)
    while True:
        block = os.read(part, CHUNK_BYTES)
        if not block:
            return digest, offset
        digest.update(block)
        offset += len(block)


def read_some(limit: int) -> bytes:
    readable, _, _ = select.select([0], [], [], SILENCE_S)
    return os.read(0, min(limit, CHUNK_BYTES)) if readable else b""


def write_all(fd: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(fd, view) :]


def is_stored(path: str, sha256: str, size: int) -> bool:
    try:
        if os.path.getsize(path) != size:
            return False
    except OSError:
        return False
    return size > ALWAYS_HASHED_BYTES or hash_file(path) == sha256


def hash_file(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(CHUNK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


def free_bytes(path: str) -> int:
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def sweep(folder: str) -> None:
    """Removes parts that nobody resumed and blobs that nobody used for long."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        kept_s = PART_KEPT_S if name.endswith(".part") else BLOB_KEPT_S
        try:
            if time.time() - os.stat(path).st_mtime > kept_s:
                os.remove(path)
        except OSError:
            pass  # somebody else's sweep was first


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
