from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jetway.tasks.on_device import blobs, errors, job, transfer
from jetway.tasks.on_device.job import Job


def make_job(folder: Path, **changes: Any) -> Job:
    spec = {"job": "one", "work_dir": str(folder), "orphan_grace_s": 5, "verb": "build", "timeout_s": 5}
    made = Job({**spec, **changes})
    os.makedirs(made.folder)
    made.write("heartbeat", "")
    return made


def test_heartbeat_counts_on_the_monotonic_clock(tmp_path: Path) -> None:
    made = make_job(tmp_path)
    made.beat()
    assert 0 <= made.silence_s() < 1
    past = int((time.monotonic() - 7) * 1e9)
    os.utime(made.path("heartbeat"), ns=(past, past))
    assert 7 <= made.silence_s() < 8
    with pytest.raises(errors.DeviceError) as caught:
        job.tick(made, 0.01)
    assert caught.value.kind == errors.ORPHANED


def test_progress_resumes_from_its_offset_and_skips_half_lines(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    made = make_job(tmp_path)
    made.append_progress({"done": 1})
    offset = job.emit_progress(made, 0, sys.stdout.buffer)
    made.append_progress({"done": 2})
    with open(made.path("progress.jsonl"), "ab") as file:
        file.write(b'{"done": ')
    assert job.emit_progress(made, offset, sys.stdout.buffer) == 2 * offset
    out = capfdbinary.readouterr().out
    assert [line.count(b"done") for line in out.splitlines()] == [1, 1]


def test_outcome_of_a_vanished_supervisor(tmp_path: Path) -> None:
    made = make_job(tmp_path)
    made.write("boot_id", job.lease.boot_id())
    assert job.find_outcome(made) == {"gone": "died"}
    assert not os.path.exists(made.folder)
    assert job.find_outcome(made) == {"gone": "orphaned"}
    made = make_job(tmp_path)
    made.write("boot_id", "another")
    assert job.find_outcome(made) == {"gone": "rebooted"}


def test_sweep_spares_live_and_fresh_jobs(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("live", "dead", "fresh")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "lock").touch()
    for name in ("live", "dead"):
        os.utime(folders[name], (0, 0))
    with open(folders["live"] / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job.sweep(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["fresh", "live"]


@pytest.mark.parametrize(
    ("exc", "kind"),
    [
        (MemoryError(), errors.OUT_OF_MEMORY),
        (OSError(errno.ENOSPC, "full"), errors.DISK_FULL),
        (OSError(errno.EACCES, "no"), errors.FAILED),
        (ValueError("x"), errors.FAILED),
    ],
)
def test_failures_are_told_apart(exc: Exception, kind: str) -> None:
    assert job.describe_failure(exc)["kind"] == kind


def death(command: str, kills_before: int | None) -> dict[str, str]:
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", command], os.environ)
    return job.describe_death("build", os.waitpid(pid, 0)[1], kills_before)


def test_a_kill_counts_as_out_of_memory_only_when_the_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "oom_kills", lambda: 4)
    assert death("kill -9 $$", 3)["kind"] == errors.OUT_OF_MEMORY
    assert death("kill -9 $$", 4)["kind"] == errors.FAILED
    assert death("kill -11 $$", 3)["kind"] == errors.FAILED
    monkeypatch.setattr(job, "oom_kills", lambda: None)
    assert death("kill -9 $$", None)["kind"] == errors.OUT_OF_MEMORY
    assert death(f"exit {errno.ENOSPC}", None)["kind"] == errors.DISK_FULL
    assert death("exit 1", None)["kind"] == errors.FAILED


def test_end_group_ends_what_ignores_a_polite_word() -> None:
    command = "trap '' TERM; sleep 96.11 & wait; sleep 96.11"
    child = subprocess.Popen(["sh", "-c", command], start_new_session=True)
    time.sleep(0.2)
    job.end_group(child.pid, 0.3)
    child.returncode = -signal.SIGKILL
    until = time.monotonic() + 5
    while any(b"96.11" in read_command_line(path) for path in Path("/proc").glob("[0-9]*/cmdline")):
        assert time.monotonic() < until


def test_end_group_returns_when_nothing_of_the_group_is_left() -> None:
    supervisor = os.fork()
    if supervisor == 0:
        job.adopt_orphans()
        worker = os.posix_spawn("/bin/sh", ["sh", "-c", "sleep 96.12 & sleep 96.12"], os.environ, setpgroup=0)
        time.sleep(0.2)
        job.end_group(worker, 0.0)
        try:
            os.killpg(worker, 0)
        except ProcessLookupError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(supervisor, 0)[1] == 0


def read_command_line(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_verbs_are_found_by_name() -> None:
    for verb in ("nonsense", "errors", "os.path", "../x"):
        with pytest.raises(errors.DeviceError, match="no verb"):
            job.find_verb(verb)


def test_blobs_of_a_request_are_checked(tmp_path: Path) -> None:
    folder = tmp_path / "blobs"
    folder.mkdir()
    good = folder / ("a" * 64)
    good.write_bytes(b"content")
    digest = transfer.hash_file(str(good))
    good = good.rename(folder / digest)
    blobs.check_request({"a": [{"b": str(good)}], "c": "/elsewhere", "d": 3}, str(tmp_path))
    with pytest.raises(errors.DeviceError) as missing:
        blobs.check_request([str(folder / "absent")], str(tmp_path))
    assert missing.value.kind == errors.BAD_REQUEST
    good.write_bytes(b"other content")
    with pytest.raises(errors.DeviceError) as corrupt:
        blobs.check_request([str(good)], str(tmp_path))
    assert corrupt.value.kind == errors.CORRUPT
    assert not good.exists()


def test_old_parts_and_unused_blobs_are_swept(tmp_path: Path) -> None:
    now = time.time()
    ages = {"new": 0, "old": transfer.BLOB_KEPT_S + 9, "new.part": 60, "old.part": transfer.PART_KEPT_S + 9}
    for name, age in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - age, now - age))
    transfer.sweep(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["new", "new.part"]
