"""The machine's lease on an accelerator: one job at a time, whoever started it and from whatever folder.

It is a kernel lock (flock) on a file in a machine-wide folder, so it frees itself when its holder dies. The
file holds a JSON line about the holder, for the others to read. A log beside it gets a line when the lease is
taken and one when it is given back, with seconds since boot.
"""

import fcntl
import hashlib
import json
import os
import re
import stat
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Optional

from jetway.tasks.on_device import errors, machine

# Every user must come to the same answer, so the first that all of them can write to is taken.
PLACES = ("/run/lock", "/tmp", "/var/tmp", "/dev/shm")
POLL_S = 0.2
# A holder writes who it is just after it has locked the file.
UNNAMED_S = 1.0
LOG_LIMIT_BYTES = 1 << 20


def boot_id() -> str:
    return machine.read_text("/proc/sys/kernel/random/boot_id") or "unknown-boot"


def accelerator_id(engine: str) -> str:
    """What the engine runs on: the first GPU's UUID, a Jetson's serial number, or the CPU."""
    if engine != "tensorrt":
        return "cpu"
    return _gpu_uuid() or machine.read_text("/proc/device-tree/serial-number") or "gpu"


def directory() -> str:
    """The machine-wide folder of the leases, made on first use for all users to share."""
    for place in PLACES:
        if os.path.isdir(place) and os.stat(place).st_mode & 0o1777 == 0o1777 and os.access(place, os.W_OK):
            return _shared_folder(os.path.join(place, "jetway"))
    raise errors.DeviceError(
        "No folder that all users share can be written to (%s), so the accelerator cannot be leased. "
        "Make /tmp writable (mode 1777)." % ", ".join(PLACES)
    )


def lease_path(accelerator: str, folder: str) -> str:
    name = re.sub(r"[^A-Za-z0-9-]", "_", accelerator)[:40]
    tag = hashlib.sha256((boot_id() + accelerator).encode()).hexdigest()[:12]
    return os.path.join(folder, "%s-%s.lease" % (name, tag))


def read_holder(path: str) -> Optional[Dict[str, Any]]:
    """Who holds the lease, or None when nobody does."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _read_json(lock)
    finally:
        os.close(lock)


@contextmanager
def held(
    accelerator: str,
    job: str,
    timeout_s: float,
    wait: Callable[[float, Optional[Dict[str, Any]]], None],
    folder: Optional[str] = None,
    owner: str = "",
) -> Iterator[int]:
    """Holds the lease in the body; yields the lock's file descriptor, which a forked child must close.

    ``wait(seconds, holder)`` is called while another job holds it. Raises DeviceError, kind ``busy``, once it has
    waited ``timeout_s`` for jobs of other owners; for those of its own ``owner`` it waits as long as they take.
    """
    path = lease_path(accelerator, folder or directory())
    lock = _acquire(path, accelerator, owner, timeout_s, wait)
    holder = {"job": job, "owner": owner, "pid": os.getpid(), "uid": os.getuid(), "since": _now()}
    _write_holder(lock, holder)
    _log(path, "acquire", job)
    try:
        yield lock
    finally:
        _log(path, "release", job)
        os.ftruncate(lock, 0)
        os.close(lock)


def _acquire(path: str, accelerator: str, owner: str, patience_s: float, wait: Callable[..., None]) -> int:
    unnamed_s = UNNAMED_S
    while True:
        lock = _open_shared(path)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.fstat(lock).st_ino == os.stat(path).st_ino:
                return lock
            holder = None
        except BlockingIOError:
            holder = _read_json(lock)
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        foreign = not owner or (holder or {}).get("owner") != owner
        if foreign and patience_s <= 0 and (holder or unnamed_s <= 0):
            raise errors.DeviceError(_busy_message(accelerator, holder), kind=errors.BUSY)
        began = time.monotonic()
        wait(POLL_S, holder)
        waited_s = time.monotonic() - began
        if foreign:
            patience_s -= waited_s
            unnamed_s -= waited_s


def name_of(holder: Optional[Dict[str, Any]]) -> str:
    """The job that holds a lease, for people."""
    if not holder:
        return "another job"
    return "job %s%s" % (holder.get("job"), " of %s" % holder["owner"] if holder.get("owner") else "")


def _busy_message(accelerator: str, holder: Optional[Dict[str, Any]]) -> str:
    who = name_of(holder)
    if holder:
        who += " (pid %(pid)s, uid %(uid)s, since %(since)s)" % holder
    return "The accelerator %s is held by %s. Wait for it, or raise busy_timeout_s of the target." % (
        accelerator,
        who,
    )


def _open_shared(path: str, flags: int = 0) -> int:
    """Opens a file that any user may have made.

    Creating is a step of its own: in a sticky folder the kernel refuses O_CREAT on another user's file.
    """
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW | flags)
        except FileNotFoundError:
            pass
        try:
            made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | flags, 0o666)
        except FileExistsError:
            continue
        os.fchmod(made, 0o666)
        return made


def _shared_folder(path: str) -> str:
    try:
        os.mkdir(path)
        os.chmod(path, 0o1777)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise errors.DeviceError("%s must be a folder: the leases live there. Remove it." % path)
    return path


def _read_json(lock: int) -> Optional[Dict[str, Any]]:
    try:
        value = json.loads(os.pread(lock, 4096, 0).decode())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _write_holder(lock: int, holder: Dict[str, Any]) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(holder).encode() + b"\n", 0)


def _log(path: str, event: str, job: str) -> None:
    record = {"event": event, "job": job, "pid": os.getpid(), "monotonic_s": time.monotonic(), "at": _now()}
    log = _open_shared(path + ".log", os.O_APPEND)
    try:
        if os.fstat(log).st_size > LOG_LIMIT_BYTES:
            os.ftruncate(log, 0)
        os.write(log, json.dumps(record).encode() + b"\n")
    finally:
        os.close(log)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _gpu_uuid() -> Optional[str]:
    for path in machine.system_files("/proc/driver/nvidia/gpus/*/information"):
        found = re.search(r"GPU UUID:\s*(\S+)", machine.read_text(path) or "")
        if found:
            return found.group(1)
    return None
