"""Peak memory of one engine: a process of its own that loads it, runs it, and does nothing else."""

import json
import os
import subprocess
import sys
from typing import Any, Dict

from jetway.tasks.on_device import machine, tensors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.onnxruntime_engine import OnnxRuntimeSession, import_engine

RUNS = 5
CHILD = "from jetway.tasks.on_device import memory; memory.main()"


def peak_of(entry: Dict[str, Any]) -> Dict[str, Any]:
    """Memory of a process that runs the engine, in MiB.

    ``peak`` is all that a device must hold: the interpreter, numpy, the runtime, the engine and its buffers.
    ``engine`` is what loading and running the engine added to that.
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    command = [sys.executable, "-c", CHILD, json.dumps(entry)]
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    stdout, stderr = child.communicate()
    if child.returncode != 0:
        raise DeviceError(
            "The process that measures the memory of {} ended with status {}: {}".format(
                entry["name"], child.returncode, stderr.decode("utf-8", "replace").strip()[-500:]
            )
        )
    return dict(json.loads(stdout.decode("utf-8")))


def main() -> None:
    """The child's whole life: measure, print one JSON object."""
    entry = json.loads(sys.argv[1])
    import_engine()
    before = machine.process_memory_mib()["now"]
    session = OnnxRuntimeSession(entry["path"], entry["load_options"])
    inputs = session.inputs_of(tensors.read_tensors(entry["inputs"]))
    for _ in range(RUNS):
        session.run_checked(inputs)
    peak = machine.process_memory_mib()["peak"]
    added = None if peak is None or before is None else round(peak - before, 1)
    print(json.dumps({"peak": peak, "engine": added}))
