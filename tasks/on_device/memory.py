"""Peak memory of one engine: a process of its own that loads it, runs it, and does nothing else."""

from typing import Any, Callable, Dict, Optional

from jetway.tasks.on_device import children, cuda, engines, machine, sessions

RUNS = 5


def peak_of(entry: Dict[str, Any]) -> Dict[str, Any]:
    """Memory of a process that runs the engine of a checked entry, in MiB.

    ``peak`` is all that the host's memory must hold: the interpreter, the runtime, the engine and its buffers.
    ``engine`` is what loading and running the engine added to that. ``device`` is what it added on a GPU, whose
    ``device_free`` it had: memory of its own or, on an integrated GPU, the one that both share. CUDA's own context
    is there before. None where no GPU is used.
    """
    return children.result_of("jetway.tasks.on_device.memory", "measure", entry)


def measure(entry: Dict[str, Any], progress: Callable[[Dict[str, Any]], None]) -> Dict[str, Any]:
    """The child's work."""
    engines.engine_of(entry["engine"]).version()
    device_free_mib = device_meter() if entry["uses_gpu"] else lambda: None
    before, free_before = machine.process_memory_mib()["now"], device_free_mib()
    session, inputs = sessions.opened_with_inputs(entry)
    for _ in range(RUNS):
        session.run_checked(inputs)
    peak = machine.process_memory_mib()["peak"]
    return {
        "peak": peak,
        "engine": _difference(peak, before),
        "device": _difference(free_before, device_free_mib()),
        "device_free": free_before,
    }


def device_meter() -> Callable[[], Optional[float]]:
    """What tells the free memory of the GPU, in MiB."""
    runtime = cuda.CudaRuntime()
    if runtime.attribute("integrated"):  # where CUDA counts the page cache as used
        return lambda: machine.memory_mib()["available"]
    return lambda: runtime.memory_bytes()["free"] / 2.0**20


def _difference(more: Optional[float], less: Optional[float]) -> Optional[float]:
    return None if more is None or less is None else round(more - less, 1)
