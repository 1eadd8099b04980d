"""A job: long work that outlives the connection which started it, but not the host that wants it.

Three processes. ``follow`` runs under the SSH session: it starts the job or attaches to it, streams progress,
and passes the host's heartbeats on. The supervisor is detached: it holds the lease, forks the worker, and
ends it when the host falls silent, when time is up, or when it is told to. The worker, in a process group of
its own, runs the verb.

The folder ``jobs/<id>`` holds ``lock`` (a flock that lives as long as the supervisor), ``pid``, ``boot_id``,
``heartbeat`` (its mtime is the monotonic clock at the last word from the host), ``progress.jsonl``, ``log``,
and at the end ``result.json``. The supervisor removes it when the host has the result, or is gone.
"""

import ctypes
import errno
import fcntl
import importlib
import json
import os
import select
import shutil
import signal
import sys
import time
import traceback
from typing import Any, BinaryIO, Callable, Dict, List, Optional

from jetway.tasks.on_device import blobs, errors, lease, power_mode
from jetway.tasks.on_device.errors import DeviceError

SCHEMA_VERSION = 1
TICK_S = 0.5
FOLLOW_POLL_S = 0.1
#: Between a polite end and a kill of the worker's group.
TERM_GRACE_S = 2.0
#: How long before the promised moment an orphan is ended, so that the promise holds.
ORPHAN_MARGIN_S = 1.0
ABANDONED_S = 60
LOG_TAIL_BYTES = 4000
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

Json = Dict[str, Any]
Progress = Callable[[Json], None]


class Job:
    """The job's folder, and what can be read from it."""

    def __init__(self, spec: Json) -> None:
        self.spec = spec
        self.folder = os.path.join(spec["work_dir"], "jobs", spec["job"])

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def beat(self) -> None:
        """Notes a word from the host. The monotonic clock is the machine's, and no time jump moves it."""
        now = int(time.monotonic() * 1e9)
        try:
            os.utime(self.path("heartbeat"), ns=(now, now))
        except FileNotFoundError:
            pass  # the job has just ended and removed its folder

    def silence_s(self) -> float:
        return time.monotonic() - os.stat(self.path("heartbeat")).st_mtime_ns / 1e9

    def is_supervised(self) -> bool:
        return is_locked(self.path("lock"))

    def read(self, name: str) -> str:
        try:
            with open(self.path(name)) as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def write(self, name: str, text: str) -> None:
        """Whole or not at all."""
        with open(self.path(name + ".part"), "w") as file:
            file.write(text)
        os.rename(self.path(name + ".part"), self.path(name))

    def append_progress(self, line: Json) -> None:
        with open(self.path("progress.jsonl"), "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")

    def log_tail(self) -> str:
        with open(self.path("log"), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")

    def end(self) -> None:
        """Tells the supervisor to stop the work, if any is left, and to remove the folder; waits for that."""
        while self.is_supervised():
            send_signal(os.kill, int(self.read("pid") or 0), signal.SIGTERM)
            time.sleep(0.02)
        shutil.rmtree(self.folder, ignore_errors=True)


# The side of the SSH session


def follow(spec: Json, out: BinaryIO) -> int:
    """Starts the job unless it is there, and streams it to ``out`` until the host ends it or falls silent.

    Lines are JSON behind a record separator: ``progress`` with the ``offset`` to resume from, then one of
    ``result``, ``error`` or ``gone``. On stdin, any byte is a heartbeat and ``e`` ends the job.
    """
    job = Job(spec)
    if not os.path.isdir(job.folder):
        if spec["started"]:
            emit(out, gone="orphaned")
            return 0
        sweep(os.path.dirname(job.folder))
        start(job)
    emit(out, started=True)
    job.beat()
    return stream(job, out)


def stream(job: Job, out: BinaryIO) -> int:
    offset, done = job.spec.get("offset", 0), False
    heard = time.monotonic()
    while time.monotonic() - heard < job.spec["orphan_grace_s"]:
        if select.select([0], [], [], FOLLOW_POLL_S)[0]:
            words = os.read(0, 4096)
            if not words:
                return 0
            heard = time.monotonic()
            job.beat()
            if b"e" in words:
                job.end()
                return 0
        if not done:
            outcome = find_outcome(job)
            offset = emit_progress(job, offset, out)
            done = outcome is not None
            if outcome is not None:
                emit(out, **outcome)
    return 0


def find_outcome(job: Job) -> Optional[Json]:
    """What became of the job, or None while it runs."""
    supervised = job.is_supervised()
    text = job.read("result.json")
    if text:
        outcome = json.loads(text)  # type: Json
        return outcome
    if supervised:
        return None
    if not os.path.isdir(job.folder):
        return {"gone": "orphaned"}
    gone = "died" if job.read("boot_id") == lease.boot_id() else "rebooted"
    shutil.rmtree(job.folder, ignore_errors=True)
    return {"gone": gone}


def emit_progress(job: Job, offset: int, out: BinaryIO) -> int:
    try:
        with open(job.path("progress.jsonl"), "rb") as file:
            file.seek(offset)
            lines = file.read()
    except FileNotFoundError:
        return offset
    for line in lines[: lines.rfind(b"\n") + 1].splitlines():
        offset += len(line) + 1
        emit(out, progress=json.loads(line.decode()), offset=offset)
    return offset


def emit(out: BinaryIO, **fields: Any) -> None:
    out.write(b"\x1e" + json.dumps(dict(fields, schema_version=SCHEMA_VERSION)).encode() + b"\n")
    out.flush()


def start(job: Job) -> None:
    """Makes the folder and forks the supervisor, which inherits the folder's lock."""
    os.makedirs(job.folder)
    try:
        lock = os.open(job.path("lock"), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        job.write("boot_id", lease.boot_id())
        job.write("heartbeat", "")
    except OSError:
        shutil.rmtree(job.folder, ignore_errors=True)
        raise
    job.beat()
    if os.fork() == 0:
        os.setsid()
        run_and_exit(lambda: supervise(job, lock))
    os.close(lock)


def detach(log: str, keep: int) -> None:
    """Leaves the SSH session's pipes, so that it can close."""
    devnull = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(devnull, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, keep)
    os.closerange(keep + 1, 1024)


def run_and_exit(body: Callable[[], None]) -> None:
    """The end of a forked process: never returns into its parent's code."""
    status = 1
    try:
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def sweep(folder: str) -> None:
    """Removes the folders of jobs whose supervisor was killed."""
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        try:
            abandoned = time.time() - os.stat(path).st_mtime > ABANDONED_S
        except FileNotFoundError:
            continue
        if abandoned and not is_locked(os.path.join(path, "lock")):
            shutil.rmtree(path, ignore_errors=True)


def is_locked(path: str) -> bool:
    try:
        lock = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(lock)


# The detached side


def supervise(job: Job, lock: int) -> None:
    """Runs the job to its end, publishes the outcome, and stays until the host has it or is gone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    adopt_orphans()
    try:
        detach(job.path("log"), keep=lock)
        job.write("pid", str(os.getpid()))
        publish(job, outcome_of(job, lock))
        while True:
            tick(job, TICK_S)
    except DeviceError:
        pass  # told to end, or the host is gone: nobody is left to read a result
    finally:
        shutil.rmtree(job.folder, ignore_errors=True)


def publish(job: Job, outcome: Json) -> None:
    try:
        job.write("result.json", json.dumps(outcome))
    except OSError as exc:
        for name in ("outcome.json", "log", "progress.jsonl", "result.json.part"):
            if os.path.exists(job.path(name)):
                os.unlink(job.path(name))  # room for the bad news
        job.write("result.json", json.dumps({"error": describe_failure(exc)}))


def outcome_of(job: Job, lock: int) -> Json:
    try:
        if not job.spec["lease"]:
            return run_worker(job, [lock])
        accelerator = lease.accelerator_id(job.spec["engine"])
        announce = Announcer(job, accelerator)
        with lease.held(
            accelerator,
            job.spec["job"],
            job.spec["busy_timeout_s"],
            announce.wait,
            owner=job.spec.get("owner", ""),
        ) as held:
            with power_mode.left_as_found(job.spec["work_dir"]):
                return run_worker(job, [lock, held])
    except DeviceError as exc:
        if exc.kind in (errors.ORPHANED, errors.CANCELLED):
            raise
        return {"error": exc.to_json()}
    except Exception as exc:
        traceback.print_exc()
        return {"error": describe_failure(exc), "log": job.log_tail()}


class Announcer:
    """Says once whom the job waits for."""

    def __init__(self, job: Job, accelerator: str) -> None:
        self.job, self.accelerator, self.last = job, accelerator, ""

    def wait(self, seconds: float, holder: Optional[Json]) -> None:
        who = lease.name_of(holder)
        if who != self.last:
            self.job.append_progress({"text": "waiting for %s, held by %s" % (self.accelerator, who)})
            self.last = who
        tick(self.job, seconds)


def tick(job: Job, seconds: float) -> None:
    """Waits; returns early when a child ends. Raises DeviceError when the job must end."""
    info = signal.sigtimedwait(SIGNALS, seconds)
    if info is not None and info.si_signo != signal.SIGCHLD:
        raise DeviceError("The host ended the job.", kind=errors.CANCELLED)
    if job.silence_s() > job.spec["orphan_grace_s"] - ORPHAN_MARGIN_S:
        raise DeviceError("The host fell silent.", kind=errors.ORPHANED)


def run_worker(job: Job, inherited: List[int]) -> Json:
    """Forks the worker and waits for it. Whatever happens, nothing of its process group is left."""
    kills_before = oom_kills()
    supervisor = os.getpid()
    worker = os.fork()
    if worker == 0:
        run_and_exit(lambda: work(job, supervisor, inherited))
    set_group(worker)
    deadline = time.monotonic() + job.spec["timeout_s"]
    try:
        status = wait_for(job, worker, deadline)
    except DeviceError as exc:
        end_group(worker, 0.0 if exc.kind == errors.ORPHANED else TERM_GRACE_S)
        raise
    end_group(worker, 0.0)
    return read_outcome(job, status, kills_before)


def wait_for(job: Job, worker: int, deadline: float) -> int:
    while True:
        pid, status = os.waitpid(worker, os.WNOHANG)
        if pid:
            return status
        if time.monotonic() > deadline:
            raise DeviceError(
                "%s took longer than %g s and was stopped. Raise timeout_s of the stage in the recipe."
                % (job.spec["verb"], job.spec["timeout_s"]),
                kind=errors.TIMEOUT,
            )
        tick(job, min(TICK_S, max(0.01, deadline - time.monotonic())))


def set_group(worker: int) -> None:
    """Both sides call it, so that the group is there whoever comes first."""
    try:
        os.setpgid(worker, worker)
    except (PermissionError, ProcessLookupError):
        pass


def end_group(worker: int, patience_s: float) -> None:
    """Ends every process of the worker's group: politely for ``patience_s``, then at once."""
    if patience_s and send_signal(os.killpg, worker, signal.SIGTERM):
        until = time.monotonic() + patience_s
        while time.monotonic() < until and is_running(worker):
            time.sleep(0.02)
    send_signal(os.killpg, worker, signal.SIGKILL)
    bury_group(worker)


def bury_group(worker: int) -> None:
    """Waits for the worker and for all of its group that fell to us, so that the lease passes on idle hardware."""
    try:
        while True:
            os.waitpid(-worker, 0)
    except ChildProcessError:
        pass


def adopt_orphans() -> None:
    """Asks Linux to make this process the parent of what its worker leaves behind, so that it can wait for it."""
    control_process(PR_SET_CHILD_SUBREAPER, 1)


def control_process(option: int, value: int) -> bool:
    """Linux's prctl; whether there is one."""
    try:
        ctypes.CDLL(None).prctl(option, value)
    except (OSError, AttributeError):
        return False
    return True


def is_running(worker: int) -> bool:
    return os.waitid(os.P_PID, worker, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def send_signal(kill: Callable[[int, int], None], pid: int, number: int) -> bool:
    """Whether there was somebody to send it to; 0, a pid not known yet, is nobody."""
    try:
        if pid:
            kill(pid, number)
        return bool(pid)
    except (ProcessLookupError, PermissionError):
        return False


def read_outcome(job: Job, status: int, kills_before: Optional[int]) -> Json:
    text = job.read("outcome.json")
    if text:
        outcome = json.loads(text)  # type: Json
        return outcome if "result" in outcome else dict(outcome, log=job.log_tail())
    return {"error": describe_death(job.spec["verb"], status, kills_before), "log": job.log_tail()}


def describe_death(verb: str, status: int, kills_before: Optional[int]) -> Dict[str, str]:
    """An error for a worker that wrote no outcome. The kernel kills with SIGKILL when memory is short."""
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == errno.ENOSPC:
        return describe_failure(OSError(errno.ENOSPC, "no room for the result of %s" % verb))
    if not os.WIFSIGNALED(status):
        return DeviceError("%s ended without a result (exit %d)." % (verb, status >> 8)).to_json()
    number = os.WTERMSIG(status)
    kills = oom_kills()
    if number == signal.SIGKILL and (kills is None or kills != kills_before):
        return DeviceError(
            "%s was killed: the target ran out of memory. Free some, or use a smaller network." % verb,
            kind=errors.OUT_OF_MEMORY,
            cause="out_of_memory",
        ).to_json()
    name = signal.Signals(number).name
    return DeviceError("%s was killed by %s; see the log below." % (verb, name)).to_json()


def oom_kills() -> Optional[int]:
    """Processes that the kernel has killed for memory since boot; None where it does not count them."""
    try:
        with open("/proc/vmstat") as file:
            for line in file:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    except OSError:
        pass
    return None


def work(job: Job, supervisor: int, inherited: List[int]) -> None:
    """The worker: runs the verb and writes ``outcome.json``."""
    os.setpgid(0, 0)
    die_with(supervisor)
    for fd in inherited:
        os.close(fd)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    prefer_as_oom_victim()
    os.chdir(job.folder)
    try:
        job.write("outcome.json", json.dumps(run_verb(job.spec, job.append_progress)))
    except OSError as exc:
        os._exit(exc.errno or 1)


def die_with(supervisor: int) -> None:
    """Asks Linux to kill this process when the supervisor dies, however it dies."""
    if control_process(PR_SET_PDEATHSIG, signal.SIGKILL) and os.getppid() != supervisor:
        os._exit(1)


def prefer_as_oom_victim() -> None:
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    except OSError:
        pass  # a kernel without it picks by size, which is as good


def run_verb(spec: Json, progress: Progress) -> Json:
    """Runs the module named by the verb. Returns ``{"result": ...}`` or ``{"error": ...}``."""
    try:
        request = dict(spec["request"], work_dir=spec["work_dir"])
        blobs.check_request(request, spec["work_dir"])
        return {"result": find_verb(spec["verb"])(request, progress)}
    except DeviceError as exc:
        return {"error": exc.to_json()}
    except Exception as exc:
        traceback.print_exc()
        return {"error": describe_failure(exc)}


def find_verb(verb: str) -> Callable[[Json, Progress], Json]:
    name = "jetway.tasks.on_device." + verb
    try:
        run = getattr(importlib.import_module(name), "run", None) if verb.isidentifier() else None
    except ImportError as exc:
        if exc.name != name:
            raise
        run = None
    if run is None:
        raise DeviceError("There is no verb %r." % verb, kind=errors.BAD_REQUEST)
    found = run  # type: Callable[[Json, Progress], Json]
    return found


def describe_failure(exc: Exception) -> Dict[str, str]:
    text = "%s: %s" % (type(exc).__name__, exc)
    if isinstance(exc, MemoryError):
        return DeviceError(
            "The target ran out of memory (%s)." % text, errors.OUT_OF_MEMORY, "out_of_memory"
        ).to_json()
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return DeviceError("The target's disk is full (%s)." % text, errors.DISK_FULL, "disk_full").to_json()
    return DeviceError(text).to_json()
