"""Deletes each of the worker's guards in turn and lets the worker do its work through the double of TensorRT that is
on the path: what it does must change, or break, where the version lacks the name. In one process for each version.

``argv``: a folder with the networks and inputs (see ``networks``), and the names to try, all by default. Writes for
each name that this version lacks what came of deleting its guards one at a time: ``same`` where nothing changed, as
where another guard stands beside it.
"""

import contextlib
import hashlib
import importlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import tensorrt as trt

from doubles import tensorrt_names
from doubles.tensorrt_names import Guard
from jetway.tasks.on_device import tensors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensorrt_engine import builder, engine, execution, options

PACKAGE = "jetway.tasks.on_device.tensorrt_engine"
FOLDER, NAMES = Path(sys.argv[1]), sys.argv[2:]
SHAPES = {kind: [batch, 1, 8, 8] for kind, batch in (("min", 1), ("opt", 2), ("max", 4))}
CALIBRATED = {"precision": "int8-calibrated"}
DLA = {"precision": "fp16", "dla": {"core": 0, "gpu_fallback": True, "layers": {}}}
#: What the worker is asked to do: the network, the options, and variables.
JOBS: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("fp32", {}, {}),
    ("open", {"profiles": [{"image": SHAPES}]}, {}),
    ("fp16", {"precision": "fp16", "mixed": {"Gemm*": "fp32"}}, {}),
    ("bf16", {"precision": "bf16"}, {}),
    ("int8", {"precision": "int8"}, {}),
    ("fp32", {**CALIBRATED, "calibration": {"algorithm": "entropy"}, "mixed": {"Gemm*": "fp32"}}, {}),
    ("fp32", {**CALIBRATED, "calibration": {"algorithm": "minmax"}, "mixed": {"Gemm*": "bf16"}}, {}),
    ("fp16", DLA, {"TENSORRT_DOUBLE_DLA_CORES": "1"}),
    ("fp32", {}, {"TENSORRT_DOUBLE_FAULT": "unsupported:Conv"}),
    ("fp32", {"optimization_level": 1}, {}),
    ("fp32", {"max_aux_streams": 0}, {}),
    ("fp32", {"version_compatible": True}, {}),
    ("fp32", {"hardware_compatibility": "ampere_plus"}, {}),
    ("fp32", {"hardware_compatibility": "same_compute_capability"}, {}),
]


def main() -> None:
    found: dict[str, list[str]] = {}
    with contextlib.redirect_stderr(io.StringIO()):
        expected = work()
        for path in tensorrt_names.files():
            for guard in tensorrt_names.read(path).guards:
                name = f"{guard.owner}.{guard.name}"
                if (not NAMES or name in NAMES) and lacks(guard):
                    found.setdefault(name, []).append(outcome(path, guard, expected))
    json.dump(found, sys.stdout)


def lacks(guard: Guard) -> bool:
    return any(trt.__version__.startswith(name) for name in tensorrt_names.lacking(guard.owner, guard.name))


def outcome(path: Path, guard: Guard, expected: list[Any]) -> str:
    module = importlib.import_module(f"{PACKAGE}.{path.stem}")
    replace(module, tensorrt_names.without(path, guard), path)
    try:
        return "same" if work() == expected else "changed"
    except Exception as exc:
        return type(exc).__name__
    finally:
        replace(module, path.read_text(), path)


def replace(module: ModuleType, source: Any, path: Path) -> None:
    """Runs the source as the module, and hands its new functions to the modules that had imported the old."""
    old = dict(vars(module))
    exec(compile(source, str(path), "exec"), vars(module))
    for name, other in list(sys.modules.items()):
        if name.startswith(PACKAGE):
            for key, value in list(vars(other).items()):
                if key in old and value is old[key] and value is not vars(module)[key] and callable(value):
                    setattr(other, key, vars(module)[key])


def work() -> list[Any]:
    return [engine.facts(), *(done(*job) for job in JOBS)]


def done(network: str, asked: dict[str, Any], variables: dict[str, str]) -> Any:
    """What a build, a run and a profile of the network come to; an error that the worker raises is its text."""
    os.environ.update(variables)
    try:
        return built_and_run(network, asked)
    except DeviceError as exc:
        return str(exc)
    finally:
        for name in variables:
            del os.environ[name]


def built_and_run(network: str, asked: dict[str, Any]) -> Any:
    if "calibration" in asked:
        calibration = dict(asked["calibration"], batches=[str(FOLDER / "one.safetensors")])
        asked = dict(asked, calibration=calibration)
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "onnx": str(FOLDER / f"{network}.onnx"),
            "inputs": str(FOLDER / "one.safetensors"),
            "options": options.normalised({"options": asked}),
            "platform": {},
            "workspace_mib": 64,
            "work_dir": folder,
            "engine_path": f"{folder}/engine",
        }
        facts = builder.build(request, lambda line: None)
        facts.pop("calibration")
        return [facts, *run(request)]


def run(request: dict[str, Any]) -> list[Any]:
    session = execution.Session(request["engine_path"], options.for_loading(request["options"]))
    try:
        inputs = session.inputs_of(tensors.read_tensors(request["inputs"]))
        outputs = [hashlib.sha256(tensor.data).hexdigest() for tensor in session.run(inputs)]
        information, times = session.layers(inputs, 1)
        layers = [name for name, _ in times[0]]
        return [session.batch_limits(), session.device_memory_bytes(), outputs, information, layers]
    finally:
        session.close()


main()
