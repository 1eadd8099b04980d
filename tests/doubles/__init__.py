"""Doubles of NVIDIA's software: named doubles everywhere, and good for plumbing alone. ``installation`` makes one
ready for a process: the double of TensorRT on its path, the double of libcudart compiled."""

import os
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
TENSORRT_PATH = FOLDER / "tensorrt_double"
#: The versions whose surface is known, with the CUDA that came with each.
CUDA_OF_TENSORRT = {
    "8.0.1.6": 10020,
    "8.2.1.8": 10020,
    "8.4.1.5": 11040,
    "8.5.2.2": 11040,
    "8.6.1.6": 12020,
    "10.0.1": 12040,
    "10.3.0": 12060,
    "10.7.0": 12060,
    "10.13.3.9": 13000,
    "10.16.1.11": 13020,
    "11.0.0.114": 13020,
    "11.1.0.106": 13020,
    "11.4.0.106": 13020,
}
#: Where all is looked at by default: one or two of each generation of the API. The slow tests take every version.
THOROUGH = ("8.0.1.6", "8.5.2.2", "8.6.1.6", "10.7.0", "10.13.3.9", "11.4.0.106")


def compile_cudart(folder: Path, cuda_version: int = 12060) -> Path:
    """The double of libcudart of that CUDA (10020 is 10.2), compiled into the folder unless it is there."""
    library = folder / f"cuda-{cuda_version}" / f"libcudart.so.{cuda_version // 1000}"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        command = ["gcc", "-shared", "-fPIC", "-O1", "-pthread", f"-DCUDART_DOUBLE_VERSION={cuda_version}"]
        subprocess.run([*command, "-o", unfinished, FOLDER / "cudart_double.c"], check=True)
        unfinished.rename(library)
    return library


def installation(folder: Path, tensorrt_version: str, **settings: object) -> dict[str, str]:
    """Variables for a process that is to find the doubles. ``settings`` are further variables, such as
    ``TENSORRT_DOUBLE_FAULT="out_of_memory_above:512"``."""
    library = compile_cudart(folder, CUDA_OF_TENSORRT.get(tensorrt_version, 12060))
    return {
        "PYTHONPATH": str(TENSORRT_PATH),
        "TENSORRT_DOUBLE_VERSION": tensorrt_version,
        "JETWAY_LIBCUDART": str(library),
        **{name: str(value) for name, value in settings.items()},
    }


def surface() -> dict[str, dict[str, str]]:
    """``{name: {version: state}}`` of tests/data/tensorrt_api/surface.tsv, which says what a state is."""
    versions: list[str] = []
    names = {}
    for line in (FOLDER.parent / "data/tensorrt_api/surface.tsv").read_text().splitlines():
        if line.startswith("# Versions:"):
            versions = line.split()[2:]
        if not line.startswith("#"):
            name, _, history, _ = line.split("\t")
            names[name] = _states(versions, dict(change.split(":") for change in history.split()))
    return names


def _states(versions: list[str], changes: dict[str, str]) -> dict[str, str]:
    states, state = {}, "-"
    for version in versions:
        state = states[version] = changes.get(version, state)
    return states
