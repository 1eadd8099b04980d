"""Facts about this process: which machine and process it is, and the software around it."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "jetway", "torch", "numpy", "onnx", "onnxruntime", "nvidia-modelopt", "torch-pruning", "mlflow",
    "prefect", "fabric", "paramiko", "asyncssh", "pydantic", "safetensors", "scikit-learn", "scipy",
    "tensorrt",
)  # fmt: skip


def host_id() -> str:
    """Name of this machine, and of this container where process ids are its own."""
    return "/".join((socket.gethostname(), _read("/etc/machine-id"), _link("/proc/self/ns/pid")))


def boot_id() -> str:
    """Changes with every boot of the machine; empty where the system has none."""
    return _read("/proc/sys/kernel/random/boot_id")


def process_id() -> str:
    """This process as ``pid:start``; the start time tells it from a later process of the same pid."""
    return f"{os.getpid()}:{_start_ticks(os.getpid())}"


def process_alive(process: str) -> bool:
    """Whether the process that ``process_id`` named, on this machine and since this boot, still runs."""
    pid, _, start = process.partition(":")
    return pid.isdigit() and _exists(int(pid)) and _start_ticks(int(pid)) == start


def git_commit(folder: Path | None = None) -> str:
    """Commit of the repository around ``folder``, with ``+changes`` if files differ; empty outside one."""
    where = folder or Path.cwd()
    commit = _git(where, "rev-parse", "HEAD")
    changed = commit and _git(where, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if changed else commit


def describe_environment() -> dict[str, Any]:
    """Python, packages, machine and commit, as JSON for the run's ``environment.json``."""
    return {
        "python": sys.version.split()[0],
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "git_commit": git_commit(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    lines = _read("/proc/cpuinfo").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return models[0] if models else platform.processor()


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _start_ticks(pid: int) -> str:
    """Field 22 of /proc/PID/stat; a zombie counts as gone."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""
