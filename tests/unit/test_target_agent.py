from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jetway.tasks.errors import JetwayError
from jetway.tasks.on_device import errors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.target.agent import ON_DEVICE, build_agent
from jetway.tasks.target.jobs import _device_error


def test_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ON_DEVICE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    assert build_agent(copy) == build_agent()
    (copy / "new.py").write_text("")
    assert build_agent(copy) != build_agent()


def test_agent_needs_nothing_of_the_host(tmp_path: Path) -> None:
    agent = tmp_path / "agent without suffix"
    agent.write_bytes(build_agent())
    spec = b'{"schema_version": 1, "verb": "nonsense", "request": {}, "work_dir": "."}'
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(agent), "call", "nonsense", str(len(spec))],
        input=spec,
        capture_output=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert b"no verb 'nonsense'" in done.stdout


@pytest.mark.parametrize("kind", errors.KINDS)
@pytest.mark.parametrize("verb", ["build", "benchmark"])
def test_every_kind_has_an_error_that_names_the_target(kind: str, verb: str) -> None:
    error = _device_error(
        DeviceError("what happened", kind, "unsupported_operator").to_json(), "", verb, "nano"
    )
    assert isinstance(error, JetwayError)
    assert str(error).startswith("nano: what happened")
    if verb == "build" and kind in ("build_failed", "out_of_memory", "disk_full"):
        assert error.cause == ("unsupported_operator" if kind == "build_failed" else kind)  # type: ignore[attr-defined]
