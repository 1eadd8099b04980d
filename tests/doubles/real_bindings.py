"""NVIDIA's own Python bindings without TensorRT: the wheels of the bindings alone (about 1 MB each), over libraries
made here that have the few symbols which the bindings need and do nothing. What can be had so are the names, the
signatures and the classes to extend; nothing can be built or run."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: Downloads survive here, as they belong to the environment's Python; ``make clean`` removes them.
CACHE = ROOT / ".venv" / "share" / "tensorrt-bindings"
PACKAGES = {
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.0.1": "tensorrt-cu12-bindings==10.0.1",
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.7.0": "tensorrt-cu12-bindings==10.7.0",
    "10.13.3.9": "tensorrt-cu13-bindings==10.13.3.9",
    "10.16.1.11": "tensorrt-cu13-bindings==10.16.1.11",
    "11.0.0.114": "tensorrt-cu12-bindings==11.0.0.114",
    "11.1.0.106": "tensorrt-cu13-bindings==11.1.0.106",
    "11.4.0.106": "tensorrt-cu13-bindings==11.4.0.106",
}
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin", "nvparsers")
#: Found with nm; the last four are those of the parsers that 8.6 still has.
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
    "_ZN11nvuffparser15createUffParserEv",
    "_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi",
    "_ZN14nvcaffeparser117createCaffeParserEv",
    "_ZN14nvcaffeparser123shutdownProtobufLibraryEv",
)
SHIM = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"


class NotAvailable(Exception):
    """The wheel cannot be had here; says why."""


class Bindings:
    """The bindings of one version, unpacked. ``folder`` takes the libraries made for them."""

    def __init__(self, version: str, folder: Path) -> None:
        self.version = version
        self.package = _unpacked(version)
        self.folder = folder / version
        _write_shim(self.folder)
        _compile_libraries(self.folder, version.split(".")[0])

    def environment(self) -> dict[str, str]:
        """For a process in which ``import tensorrt`` finds these bindings."""
        paths = [str(self.folder), str(self.package), str(ROOT / "tests")]
        return os.environ | {"LD_LIBRARY_PATH": str(self.folder), "PYTHONPATH": os.pathsep.join(paths)}

    def run(self, *arguments: str) -> str:
        return run(self.environment(), *arguments)

    def describe(self) -> dict[str, Any]:
        return describe(self.environment(), "tensorrt_bindings")


def run(environment: dict[str, str], *arguments: str) -> str:
    """What a Python process prints; it must end well."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def describe(environment: dict[str, str], module: str) -> dict[str, Any]:
    """See ``describe_bindings``."""
    script = Path(__file__).with_name("describe_bindings.py")
    found: dict[str, Any] = json.loads(run(environment, str(script), module))
    return found


def _unpacked(version: str) -> Path:
    folder = CACHE / f"{version}-{sys.implementation.cache_tag}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{version}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests of several processes come here at once
        if not folder.exists():
            _unpack(_downloaded(version), folder)
    return folder


def _unpack(wheel: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as unfinished, zipfile.ZipFile(wheel) as archive:
        archive.extractall(Path(unfinished) / "whole")
        (Path(unfinished) / "whole").rename(folder)


def _downloaded(version: str) -> Path:
    name, _, _ = PACKAGES[version].partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--retries=1", "--timeout=20", "--dest", str(CACHE)]
    done = subprocess.run([*command, PACKAGES[version]], capture_output=True, text=True, check=False)
    found = sorted(CACHE.glob(pattern))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        raise NotAvailable(f"pip cannot download {PACKAGES[version]}: {reason}")
    return found[0]


def _write_shim(folder: Path) -> None:
    """The package ``tensorrt`` over ``tensorrt_bindings``, which in real life comes with the libraries."""
    (folder / "tensorrt").mkdir(parents=True, exist_ok=True)
    (folder / "tensorrt" / "__init__.py").write_text(SHIM)


def _compile_libraries(folder: Path, major: str) -> None:
    source = folder / "nothing.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for name in LIBRARIES:
        soname = f"lib{name}.so.{major}"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", str(folder / soname)]
        subprocess.run([*command, str(source)], check=True)
