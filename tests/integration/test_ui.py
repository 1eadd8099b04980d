"""``jetway ui``: both pages answer, and its end leaves no process of it."""

import os
import re
import signal
import time
import urllib.request
from pathlib import Path

import pytest


def processes_of(home):
    """Pids of what runs for a home, by its environment, without the Prefect server that others use too."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        mine = f"JETWAY_HOME={home}".encode() in environment and path.name != str(os.getpid())
        if mine and command and b"server_process" not in command:
            found.add(int(path.name))
    return found


def address(process, name):
    """The address on the line of that name, once it is printed."""
    for line in process.stdout:
        if match := re.fullmatch(rf"{name} +(http://127\.0\.0\.1:\d+)\n", line):
            return match[1]
    pytest.fail(f"it ended without an address of {name}: {process.stderr.read()}")


def test_both_pages_answer_until_a_polite_end(start_jetway, cli_home, tmp_path):
    before = processes_of(cli_home)
    process = start_jetway("ui", cwd=tmp_path)
    pages = [address(process, name) for name in ("MLflow", "Prefect")]
    for page in pages:
        with urllib.request.urlopen(page, timeout=30) as answer:
            assert answer.status == 200
            assert b"<html" in answer.read().lower()
    assert len(processes_of(cli_home) - before) > 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert "Traceback" not in process.stderr.read()
    deadline = time.monotonic() + 5
    while left := processes_of(cli_home) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(pages[0], timeout=5)
