from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from jetway.tasks.on_device import errors, lease

CHILD = """
import sys, time
from jetway.tasks.on_device import lease
if len(sys.argv) > 4:
    import os
    os.setgroups([]); os.setgid(int(sys.argv[4])); os.setuid(int(sys.argv[4]))
owner = sys.argv[1].partition("'s")[0]
with lease.held("gpu", sys.argv[1], 20, lambda seconds, holder: time.sleep(0.01), sys.argv[2], owner):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def no_wait(seconds: float, holder: Any) -> None:
    pass


def start(job: str, folder: Path, seconds: float, *user: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, job, str(folder), str(seconds), *user]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_until_held(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"


def log_of(folder: Path) -> list[dict[str, Any]]:
    text = Path(lease.lease_path("gpu", str(folder)) + ".log").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_one_at_a_time(tmp_path: Path) -> None:
    processes = [start(f"job{number}", tmp_path, 0.1) for number in range(4)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    log = log_of(tmp_path)
    assert [record["event"] for record in log] == ["acquire", "release"] * 4
    assert all(log[i]["job"] == log[i + 1]["job"] for i in range(0, 8, 2))
    assert [record["monotonic_s"] for record in log] == sorted(record["monotonic_s"] for record in log)


def test_busy_names_the_holder(tmp_path: Path) -> None:
    process = start("the-other", tmp_path, 30)
    wait_until_held(process)
    message = rf"gpu is held by job the-other of the-other \(pid {process.pid}, uid \d+, since 20"
    with (
        pytest.raises(errors.DeviceError, match=message) as caught,
        lease.held("gpu", "mine", 0.0, no_wait, folder=str(tmp_path)),
    ):
        pass
    assert caught.value.kind == errors.BUSY
    process.kill()
    process.communicate()


def test_jobs_of_one_owner_wait_for_each_other_without_a_deadline(tmp_path: Path) -> None:
    process = start("anna's first", tmp_path, 0.5)
    wait_until_held(process)
    with lease.held("gpu", "anna's second", 0.0, lambda *_: time.sleep(0.01), str(tmp_path), "anna"):
        pass
    process.communicate()
    assert [record["job"][-6:] for record in log_of(tmp_path)[::2]] == [" first", "second"]


def test_only_others_use_up_the_patience(tmp_path: Path) -> None:
    """An owner's own job takes longer than that, then another's comes first, which there is still time to wait for."""
    waited: list[Any] = []

    def wait(seconds: float, holder: Any) -> None:
        waited.append((holder or {}).get("owner"))
        time.sleep(0.01)

    first, other = start("anna's", tmp_path, 0.5), None
    wait_until_held(first)
    other = start("ben's", tmp_path, 0.2)
    with lease.held("gpu", "mine", 5.0, wait, str(tmp_path), "anna"):
        pass
    first.communicate()
    other.communicate()
    assert "anna" in waited


def test_a_killed_holder_frees_it(tmp_path: Path) -> None:
    process = start("killed", tmp_path, 30)
    wait_until_held(process)
    path = lease.lease_path("gpu", str(tmp_path))
    assert lease.read_holder(path) is not None
    process.kill()
    process.communicate()
    assert lease.read_holder(path) is None
    with lease.held("gpu", "next", 0.0, no_wait, folder=str(tmp_path)):
        holder = lease.read_holder(path)
        assert holder is not None
        assert holder["job"] == "next"


def test_other_accelerators_and_boots_have_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        lease.held("gpu", "a", 0.0, no_wait, folder=str(tmp_path)),
        lease.held("cpu", "b", 0.0, no_wait, folder=str(tmp_path)),
    ):
        before = lease.lease_path("gpu", str(tmp_path))
        monkeypatch.setattr(lease, "boot_id", lambda: "after a reboot")
        assert lease.lease_path("gpu", str(tmp_path)) != before


@pytest.mark.skipif(os.geteuid() != 0, reason="changing users needs root")
def test_users_share_it(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if Path(tempfile.gettempdir()) in folder.parents:
            folder.chmod(0o755)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    leases = lease._shared_folder(str(shared / "jetway"))
    assert stat.S_IMODE(os.stat(leases).st_mode) == 0o1777
    with lease.held("gpu", "root's", 0.0, no_wait, folder=leases):
        process = start("nobody's", Path(leases), 0, "65534")
        time.sleep(0.3)
        assert process.poll() is None
    assert process.communicate(timeout=20)[0] == "held\n"
    assert [record["job"] for record in log_of(Path(leases))] == ["root's"] * 2 + ["nobody's"] * 2


def test_a_removed_lease_file_is_not_held_twice(tmp_path: Path) -> None:
    path = Path(lease.lease_path("gpu", str(tmp_path)))
    with lease.held("gpu", "first", 0.0, no_wait, folder=str(tmp_path)):
        path.unlink()
    with lease.held("gpu", "second", 0.0, no_wait, folder=str(tmp_path)):
        assert path.exists()


def test_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    os.symlink(tmp_path / "victim", lease.lease_path("gpu", str(tmp_path)))
    with pytest.raises(OSError, match="symbolic"), lease.held("gpu", "a", 0.0, no_wait, folder=str(tmp_path)):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_the_log_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LOG_LIMIT_BYTES", 1000)
    for number in range(40):
        with lease.held("gpu", str(number), 0.0, no_wait, folder=str(tmp_path)):
            pass
    assert Path(lease.lease_path("gpu", str(tmp_path)) + ".log").stat().st_size < 1300


def test_lines_written_at_the_same_moment_are_all_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = lease.lease_path("gpu", str(tmp_path)), os.write

    def after_another(log: int, line: bytes) -> int:
        monkeypatch.setattr(os, "write", write)
        lease._log(path, "acquire", "another")
        return write(log, line)

    monkeypatch.setattr(os, "write", after_another)
    lease._log(path, "acquire", "job")
    assert [record["job"] for record in log_of(tmp_path)] == ["another", "job"]


def test_the_machine_wide_folder_is_open_to_all() -> None:
    folder = lease.directory()
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o1777
    assert lease.directory() == folder


def test_engines_name_their_accelerator() -> None:
    assert lease.accelerator_id("onnxruntime") == "cpu"
    assert lease.accelerator_id("tensorrt") != "cpu"
