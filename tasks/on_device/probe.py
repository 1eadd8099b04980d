"""Verb ``probe``: what the target is, how much room it has, and which engines it can run."""

import sys
from typing import Any, Callable, Dict

from jetway.tasks.on_device import checkup, engines, lease, machine, power_mode
from jetway.tasks.on_device.telemetry import boards, sensors

SCHEMA_VERSION = 1


def run(request: Dict[str, Any], progress: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """``work_dir`` of the request is the folder whose free disk counts; the current one by default. ``power_mode`` and
    ``lock_clocks`` are what a measurement would set; ``power_problem`` says why it could not.

    Memory and disk are in MiB. An engine that is absent says why. ``power`` is what measures watts here.
    """
    facts = machine.identity()
    facts.update(
        schema_version=SCHEMA_VERSION,
        simulated=machine.simulated(),
        python_executable=sys.executable,
        cpu=machine.cpu(),
        cores=machine.cores(),
        boot_id=lease.boot_id(),
        memory_mib=machine.memory_mib(),
        free_disk_mib=round(machine.free_disk_mib(request.get("work_dir") or "."), 1),
        frequencies_mhz=machine.frequencies_mhz(),
        accelerators={name: lease.accelerator_id(name) for name in ("onnxruntime", "tensorrt")},
        holders={name: checkup.lease_state(name)["holder"] for name in ("onnxruntime", "tensorrt")},
        engines=engines.facts(),
        power=sensors.facts(),
        trtexec=checkup.trtexec_path(),
        power_problem=power_mode.root_problem(request.get("power_mode"), bool(request.get("lock_clocks"))),
    )
    facts.update(boards.facts(), **power_mode.facts())
    return facts
