"""Verb ``build``: an engine and its passport from an ONNX file, or the one built earlier from the same."""

import os
import time
from typing import Any, Callable, Dict, List

from jetway.tasks.on_device import errors, machine, onnxruntime_engine, outputs, passport, tensors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.onnxruntime_engine import OnnxRuntimeSession

# An engine, its temporary name and some room, against the size of the ONNX file.
DISK_FACTOR = 2.5


def run(request: Dict[str, Any], progress: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """Builds, loads what was built, and runs it once.

    Takes ``onnx`` and ``inputs`` (paths), ``onnx_sha256``, ``threads``, ``revision``, ``work_dir``, and
    ``provenance``, which goes into the passport as it is. Returns ``engine`` (path), ``passport`` and
    ``reused``. An engine that an earlier build made from the same is used again when it still is what its
    passport says.
    """
    onnxruntime_engine.import_engine()
    folder = outputs.engines_folder(request["work_dir"])
    key = passport.build_key(request["onnx_sha256"], request["threads"], request["revision"])
    engine_path = os.path.join(folder, key + ".engine")
    reused = passport.is_sound(engine_path)
    if reused:
        passport.touch(engine_path)
    else:
        _build(request, engine_path, progress)
    return {"engine": engine_path, "passport": passport.read(engine_path), "reused": reused}


def _build(request: Dict[str, Any], engine_path: str, progress: Callable[[Dict[str, Any]], None]) -> None:
    """In the job's own folder until the engine has been loaded and has run; then the passport goes first."""
    temporary = outputs.scratch_path("engine.part")
    _check_disk(request["onnx"], os.path.dirname(engine_path))
    started = time.monotonic()
    try:
        options = onnxruntime_engine.load_options(request["threads"])
        progress({"done": 0, "total": 3, "text": "optimizing the graph"})
        onnxruntime_engine.build(request["onnx"], temporary, request["threads"])
        build_s = time.monotonic() - started
        progress({"done": 1, "total": 3, "text": "loading the engine and running it once"})
        session = OnnxRuntimeSession(temporary, options)
        inputs = session.inputs_of(tensors.read_tensors(request["inputs"]))
        session.run_checked(inputs)
        progress({"done": 2, "total": 3, "text": "listing its operators"})
        costs = onnxruntime_engine.operator_costs(temporary, request["threads"], inputs)
        passport.write(engine_path, describe(request, temporary, build_s, costs))
        os.replace(temporary, engine_path)
        progress({"done": 3, "total": 3, "text": "built"})
    except OSError as exc:
        raise onnxruntime_engine.build_error(exc, request["onnx"], os.path.dirname(engine_path))
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _check_disk(onnx_path: str, folder: str) -> None:
    needed_mib = os.path.getsize(onnx_path) * DISK_FACTOR / 2.0**20 + 1
    free_mib = machine.free_disk_mib(folder)
    if free_mib < needed_mib:
        raise DeviceError(
            "The build needs {:.0f} MiB of disk, and {} has {:.0f} MiB free. Free some, or set work_dir in "
            "the target file to a folder on a larger disk.".format(needed_mib, folder, free_mib),
            errors.BUILD_FAILED,
            "disk_full",
        )


def describe(
    request: Dict[str, Any], engine_path: str, build_s: float, costs: List[Dict[str, Any]]
) -> Dict[str, Any]:
    """The passport. MACs are of the kernels as they run, so a blocked layout's padding counts."""
    return {
        "schema_version": passport.SCHEMA_VERSION,
        "engine_sha256": passport.file_sha256(engine_path),
        "engine_size_bytes": os.path.getsize(engine_path),
        "onnx_sha256": request["onnx_sha256"],
        "provenance": request.get("provenance", {}),
        "platform": passport.current_platform(),
        "cpu": machine.cpu(),
        "board": machine.board(),
        "threads": request["threads"],
        "session_options": onnxruntime_engine.session_options(request["threads"]),
        "load_options": onnxruntime_engine.load_options(request["threads"]),
        "built_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "build_s": build_s,
        "operators": _counts(costs),
        "macs": sum(cost["macs"] for cost in costs),
        "integer_macs_ratio": integer_macs_ratio(costs),
        "uncounted_operators": sorted({cost["operator"] for cost in costs if not cost["counted"]}),
    }


def _counts(costs: List[Dict[str, Any]]) -> Dict[str, int]:
    names = [cost["operator"] for cost in costs]
    return {name: names.count(name) for name in sorted(set(names))}


def integer_macs_ratio(costs: List[Dict[str, Any]]) -> float:
    """Share of the multiply-accumulates that run in integer kernels; 0 for a network that has none."""
    total = sum(cost["macs"] for cost in costs)
    return sum(cost["macs"] for cost in costs if cost["integer"]) / total if total else 0.0
