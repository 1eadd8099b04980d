"""What the fakes are: the board's files and commands, and the variables of whoever logs in there."""

from __future__ import annotations

import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

import doubles
from doubles.board import Board

FOLDER = Path(__file__).parent
CORTEX_A57 = ("ARMv8 Processor rev 1 (v8l)", "fp asimd evtstrm aes pmull sha1 sha2 crc32")
CARMEL = ("ARMv8 Processor rev 0 (v8l)", "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp")
CORTEX_A78 = ("ARMv8 Processor rev 1 (v8l)", f"{CARMEL[1]} cpuid asimdrdm lrcpc dcpop asimddp uscat ilrcpc")
XEON = ("Intel(R) Xeon(R) Platinum 8480+", "fpu sse4_2 avx avx2 fma avx512f avx512bw avx512_vnni amx_int8")


TRTEXEC = "/usr/src/tensorrt/bin/trtexec"
GPU_NAME, GPU_STATE = "NVIDIA L4", "/nvml"
GPU_FIGURES = {
    "power_mw": 31_000,
    "power_limit_mw": 72_000,
    "temperature_c": 47,
    "clock_mhz": 2040,
    "max_clock_mhz": 2040,
    "memory_clock_mhz": 6251,
    "load_percent": 60,
    "memory_total_mib": 23_034,
    "memory_used_mib": 512,
    "reasons": 0,
}


@dataclass(frozen=True)
class Machine:
    """One of the fakes. ``board`` is a key of ``doubles.board.BOARDS``; a server has none."""

    name: str
    tensorrt: str
    #: The Python that comes with it; the one below the tests' own stands in where pyenv has none such.
    python: str
    operating_system: str
    cpu: tuple[str, str]
    compute_capability: str
    memory_mib: int
    board: str | None = None
    jetpack: str | None = None
    dla_cores: int = 0


MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            "simulated-nano-jp46",
            tensorrt="8.0.1.6",
            python="3.6",
            operating_system="Ubuntu 18.04.6 LTS",
            cpu=CORTEX_A57,
            compute_capability="5.3",
            memory_mib=3964,
            board="Nano JP4.6",
            jetpack="4.6",
        ),
        Machine(
            "simulated-xavier-nx-jp51",
            tensorrt="8.5.2.2",
            python="3.8",
            operating_system="Ubuntu 20.04.6 LTS",
            cpu=CARMEL,
            compute_capability="7.2",
            memory_mib=6857,
            board="Xavier NX JP5.1",
            jetpack="5.1",
            dla_cores=2,
        ),
        Machine(
            "simulated-orin-nano-jp62",
            tensorrt="10.3.0",
            python="3.10",
            operating_system="Ubuntu 22.04.5 LTS",
            cpu=CORTEX_A78,
            compute_capability="8.7",
            memory_mib=7620,
            board="Orin Nano JP6.2",
            jetpack="6.2.1",
        ),
        Machine(
            "simulated-server-tensorrt11",
            tensorrt="11.4.0.106",
            # The tests' own, which has ONNX Runtime: what the double computes there is right.
            python=f"{sys.version_info[0]}.{sys.version_info[1]}",
            operating_system="Ubuntu 24.04.3 LTS",
            cpu=XEON,
            compute_capability="8.9",
            memory_mib=128_000,
        ),
    )
}


class Installation:
    """The machine's files below ``folder``: ``root`` for the kernel's, ``home`` for the user's."""

    def __init__(self, folder: Path, machine: Machine, compiled: Path) -> None:
        """``compiled`` is the folder in which the double of libcudart is compiled, once for all who share it."""
        self.folder, self.machine = folder, machine
        self.root, self.home = folder / "root", folder / "home"
        for path in (self.root / "bin", self.home):
            path.mkdir(parents=True)
        #: A lease on it must be no other fake's.
        self.serial = f"simulated-{uuid.uuid4().hex[:12]}"
        if machine.board:
            self.board: Board | None = Board(self.root, machine.board)
            self.write("/proc/device-tree/serial-number", self.serial)
        else:
            self.board = None
            self._write_gpu()
            compile_nvml(compiled)
        self._write_common_files()
        self._write_programs()
        self._cudart = doubles.compile_cudart(compiled, doubles.CUDA_OF_TENSORRT[machine.tensorrt])
        self._nvml = compiled / "libnvidia-ml.so.1" if machine.board is None else folder / "no NVML here"
        self.new_boot()

    @property
    def environment(self) -> dict[str, str]:
        """Of a login. Nothing of the developer's own is in it."""
        return {
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "PATH": f"{self.root / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "PYTHONPATH": str(doubles.TENSORRT_PATH),
            "JETWAY_SIMULATED_ROOT": str(self.root),
            # By name, as this machine may have libraries of its own.
            "JETWAY_LIBCUDART": str(self._cudart),
            "JETWAY_LIBNVML": str(self._nvml),
            "TENSORRT_DOUBLE_VERSION": self.machine.tensorrt,
            "TENSORRT_DOUBLE_LOG": str(self.folder / "builds.log"),
            "TENSORRT_DOUBLE_KERNEL_MS": "0.5",
            "TENSORRT_DOUBLE_DLA_CORES": str(self.machine.dla_cores),
            "CUDART_DOUBLE_COMPUTE_CAPABILITY": self.machine.compute_capability,
            "CUDART_DOUBLE_MEMORY_MIB": str(self.machine.memory_mib),
            "CUDART_DOUBLE_INTEGRATED": str(int(self.board is not None)),
            "NVML_DOUBLE_STATE": str(self.root / GPU_STATE.lstrip("/")),
            "NVML_DOUBLE_NAME": GPU_NAME,
            "NVML_DOUBLE_UUID": self.serial,
        }

    def write(self, path: str, value: object) -> None:
        """A file of the kernel's."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")

    def tell_gpu(self, **changes: int) -> None:
        """What the graphics card says from now on, by the keys of nvml_double.c."""
        figures = GPU_FIGURES | changes
        self.write(GPU_STATE, "\n".join(f"{key} {value}" for key, value in figures.items()))

    def new_boot(self) -> None:
        self.write("/proc/sys/kernel/random/boot_id", uuid.uuid4())

    def builds(self) -> list[str]:
        """A line for each build that TensorRT's double began."""
        log = self.folder / "builds.log"
        return log.read_text().splitlines() if log.exists() else []

    def _write_common_files(self) -> None:
        model, flags = self.machine.cpu
        label = "Features" if self.board else "flags"
        cores = (f"processor\t: {core}\nmodel name\t: {model}\n{label}\t: {flags}\n" for core in range(4))
        self.write("/proc/cpuinfo", "\n".join(cores))
        total_kib = self.machine.memory_mib * 1024
        memory = {"MemTotal": total_kib, "MemAvailable": total_kib * 7 // 10, "SwapFree": total_kib // 2}
        self.write("/proc/meminfo", "\n".join(f"{name}: {kib} kB" for name, kib in memory.items()))
        self.write("/etc/os-release", f'PRETTY_NAME="{self.machine.operating_system}"')

    def _write_gpu(self) -> None:
        """Of a graphics card: what its driver tells, and what NVML's double does."""
        self.tell_gpu()
        lines = (f"Model: \t\t {GPU_NAME}", f"GPU UUID:\t {self.serial}", "Bus Location: \t 0000:01:00.0")
        self.write("/proc/driver/nvidia/gpus/0000:01:00.0/information", "\n".join(lines))

    def _write_programs(self) -> None:
        """``python3`` is a wrapper: a link to a virtual environment's interpreter is not in that environment."""
        python = interpreter(self.machine.python)
        self._write_program("/bin/python3", f'exec "{python}" "$@"')
        self._write_program(TRTEXEC, f'exec "{python}" "{doubles.FOLDER / "trtexec_double.py"}" "$@"')

    def _write_program(self, path: str, line: str) -> None:
        self.write(path, f"#!/bin/sh\n{line}")
        (self.root / path.lstrip("/")).chmod(0o755)


def compile_nvml(folder: Path) -> None:
    library = folder / "libnvidia-ml.so.1"
    if not library.exists():
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, FOLDER / "nvml_double.c"], check=True)


def interpreter(version: str) -> str:
    """pyenv's Python of that version, or the one below the tests' virtual environment: ONNX Runtime is in neither."""
    if version == f"{sys.version_info[0]}.{sys.version_info[1]}":
        return sys.executable
    found = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(found[-1] if found else Path(sys.executable).resolve())
