"""Which GPU this machine has. CUDA is asked in a child, so that this process holds none of its memory."""

from typing import Any, Dict, Optional

from jetway.tasks.on_device import children, cuda, machine

_known = {}  # type: Dict[str, Any]


def identity() -> Dict[str, Any]:
    """``name``, ``compute_capability`` and ``multiprocessors`` of the first GPU; asked once a process.

    Raises DeviceError where CUDA cannot be used.
    """
    if not _known:
        _known.update(children.result_of("jetway.tasks.on_device.gpu", "ask_cuda", {}))
    return dict(_known)


def ask_cuda(request: Dict[str, Any], progress: Any) -> Dict[str, Any]:
    """The child's work."""
    runtime = cuda.CudaRuntime()
    capability = [runtime.attribute("compute_capability_" + part) for part in ("major", "minor")]
    return {
        "name": model(runtime.pci_bus_id()) or machine.board(),
        "compute_capability": "{}.{}".format(*capability),
        "multiprocessors": runtime.attribute("multiprocessors"),
    }


def model(pci_bus_id: str) -> Optional[str]:
    """The driver's name of a GPU on a PCI bus; a Jetson's GPU is on none."""
    path = "/proc/driver/nvidia/gpus/{}/information".format(pci_bus_id.lower())
    for line in (machine.read_text(path) or "").splitlines():
        if line.startswith("Model:"):
            return line.partition(":")[2].strip()
    return None
