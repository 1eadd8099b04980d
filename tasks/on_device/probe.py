"""Verb ``probe``: what the target is, how much room it has, and which engines it can run."""

import sys
from typing import Any, Callable, Dict

from jetway.tasks.on_device import lease, machine, onnxruntime_engine
from jetway.tasks.on_device.errors import DeviceError

SCHEMA_VERSION = 1


def run(request: Dict[str, Any], progress: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """``work_dir`` of the request is the folder whose free disk counts; the current one by default.

    Memory and disk are in MiB. An engine that is absent says why.
    """
    facts = machine.identity()
    facts.update(
        schema_version=SCHEMA_VERSION,
        python_executable=sys.executable,
        cpu=machine.cpu(),
        cores=machine.cores(),
        boot_id=lease.boot_id(),
        memory_mib=machine.memory_mib(),
        free_disk_mib=round(machine.free_disk_mib(request.get("work_dir") or "."), 1),
        frequencies_mhz=machine.frequencies_mhz(),
        accelerators={name: lease.accelerator_id(name) for name in ("onnxruntime", "tensorrt")},
        engines={"onnxruntime": onnxruntime_facts(), "tensorrt": tensorrt_facts()},
    )
    return facts


def onnxruntime_facts() -> Dict[str, Any]:
    try:
        module = onnxruntime_engine.import_engine()
    except DeviceError as exc:
        return {"available": False, "reason": str(exc)}
    return {
        "available": True,
        "version": module.__version__,
        "providers": module.get_available_providers(),
        "max_opset": onnxruntime_engine.max_opset(),
    }


def tensorrt_facts() -> Dict[str, Any]:
    try:
        import tensorrt
    except Exception as exc:  # a broken installation raises whatever it likes
        return {"available": False, "reason": "{}: {}".format(type(exc).__name__, exc)}
    return {"available": True, "version": tensorrt.__version__}
