"""The CUDA runtime, 10.2 to 13, through ctypes: no pycuda, no cuda-python, no numpy.

Only scalars and pointers cross the border. Structures such as cudaDeviceProp change between versions, so facts
about a device come from cudaDeviceGetAttribute. Calls that are timed are bound beforehand: ``bound`` hands out a
function without arguments that costs one foreign call and one comparison.
"""

import ctypes
import glob
import os
import re
import sys
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from jetway.tasks.on_device import errors
from jetway.tasks.on_device.errors import DeviceError

# Names a library that is none of the usual ones.
PATH_VARIABLE = "JETWAY_LIBCUDART"
SONAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so.10.2")
FOLDERS = (
    "/usr/local/cuda/lib64",
    "/usr/local/cuda/targets/*/lib",
    "/usr/lib/*-linux-gnu",
)
WHEEL_FOLDERS = ("nvidia/cu13/lib", "nvidia/cuda_runtime/lib")

POINTER = ctypes.c_void_p
OUT_POINTER = ctypes.POINTER(ctypes.c_void_p)
OUT_INT = ctypes.POINTER(ctypes.c_int)
OUT_SIZE = ctypes.POINTER(ctypes.c_size_t)
INT, UNSIGNED, SIZE = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t

# Every function that is used. All return a cudaError_t, except those of TEXT_FUNCTIONS. An argument that is not
# declared would be cut to 32 bits.
PROTOTYPES = {
    "cudaRuntimeGetVersion": (OUT_INT,),
    "cudaDriverGetVersion": (OUT_INT,),
    "cudaGetLastError": (),
    "cudaGetErrorName": (INT,),
    "cudaGetErrorString": (INT,),
    "cudaGetDeviceCount": (OUT_INT,),
    "cudaSetDevice": (INT,),
    "cudaDeviceGetAttribute": (OUT_INT, INT, INT),
    "cudaDeviceGetPCIBusId": (ctypes.c_char_p, INT, INT),
    "cudaDeviceSynchronize": (),
    "cudaMemGetInfo": (OUT_SIZE, OUT_SIZE),
    "cudaMalloc": (OUT_POINTER, SIZE),
    "cudaFree": (POINTER,),
    "cudaHostAlloc": (OUT_POINTER, SIZE, UNSIGNED),
    "cudaHostGetDevicePointer": (OUT_POINTER, POINTER, UNSIGNED),
    "cudaFreeHost": (POINTER,),
    "cudaMallocManaged": (OUT_POINTER, SIZE, UNSIGNED),
    "cudaMemcpyAsync": (POINTER, POINTER, SIZE, INT, POINTER),
    "cudaStreamCreateWithFlags": (OUT_POINTER, UNSIGNED),
    "cudaStreamDestroy": (POINTER,),
    "cudaStreamSynchronize": (POINTER,),
    "cudaStreamWaitEvent": (POINTER, POINTER, UNSIGNED),
    "cudaEventCreateWithFlags": (OUT_POINTER, UNSIGNED),
    "cudaEventDestroy": (POINTER,),
    "cudaEventRecord": (POINTER, POINTER),
    "cudaEventSynchronize": (POINTER,),
    "cudaEventElapsedTime": (ctypes.POINTER(ctypes.c_float), POINTER, POINTER),
    "cudaStreamBeginCapture": (POINTER, INT),
    "cudaStreamEndCapture": (POINTER, OUT_POINTER),
    "cudaGraphInstantiateWithFlags": (OUT_POINTER, POINTER, ctypes.c_ulonglong),
    "cudaGraphInstantiate": (OUT_POINTER, POINTER, OUT_POINTER, ctypes.c_char_p, SIZE),
    "cudaGraphLaunch": (POINTER, POINTER),
    "cudaGraphExecDestroy": (POINTER,),
    "cudaGraphDestroy": (POINTER,),
}  # type: Dict[str, Tuple[Any, ...]]
TEXT_FUNCTIONS = ("cudaGetErrorName", "cudaGetErrorString")
# Since CUDA 11.4, with one signature. ``cudaGraphInstantiate`` has five arguments up to 11 and three from 12 on,
# so it is called only where this one is missing.
OPTIONAL_FUNCTIONS = ("cudaGraphInstantiateWithFlags",)

# cudaDeviceAttr, whose numbers are part of the ABI.
ATTRIBUTES = {
    "clock_khz": 13,
    "multiprocessors": 16,
    "integrated": 18,
    "memory_clock_khz": 36,
    "l2_bytes": 38,
    "compute_capability_major": 75,
    "compute_capability_minor": 76,
    "managed_memory": 83,
    "concurrent_managed_access": 89,
}
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
EVENT_SPIN, EVENT_BLOCKING = 0, 1
HOST_ALLOC_DEFAULT, HOST_ALLOC_MAPPED = 0, 2
ATTACH_GLOBAL = 1
CAPTURE_THREAD_LOCAL = 1

FREE_MEMORY = "Close what else uses the GPU's memory, or take a smaller batch or fewer streams."
NEW_DRIVER = "Install the driver (or the JetPack) that belongs to this CUDA."
LOST = "The GPU's state is lost for this process: run again; if it comes back, look at dmesg on the target."
# What an error means to us, and what to do; any other is FAILED.
ADVICE = {
    "cudaErrorMemoryAllocation": (errors.OUT_OF_MEMORY, FREE_MEMORY),
    "cudaErrorInsufficientDriver": (errors.MISMATCH, NEW_DRIVER),
    "cudaErrorSystemDriverMismatch": (errors.MISMATCH, NEW_DRIVER),
    "cudaErrorCompatNotSupportedOnDevice": (errors.MISMATCH, NEW_DRIVER),
    "cudaErrorNoDevice": (
        errors.MISMATCH,
        "Look at CUDA_VISIBLE_DEVICES, and on a Jetson let the user join the group `video`.",
    ),
    "cudaErrorNoKernelImageForDevice": (errors.MISMATCH, "Build the engine on this GPU."),
    "cudaErrorDevicesUnavailable": (errors.BUSY, "Another process holds the GPU for itself: let it end."),
    "cudaErrorIllegalAddress": (errors.FAILED, LOST),
    "cudaErrorLaunchFailure": (errors.FAILED, LOST),
    "cudaErrorLaunchTimeout": (errors.FAILED, LOST),
    "cudaErrorECCUncorrectable": (errors.FAILED, "The GPU's memory is failing: reset it or replace it."),
}


class CudaRuntime:
    """A loaded libcudart, for one device. ``path`` names the library; otherwise it is looked for.

    Construction loads the library and makes ``device`` the current one of this thread; another thread calls
    ``use_device`` first.
    """

    def __init__(self, path: Optional[str] = None, device: int = 0) -> None:
        self.path, self._library = load_library(path)
        self.device = device
        self.use_device()

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            self._fail(name, status)

    def bound(self, name: str, *arguments: Any) -> Callable[[], None]:
        """The call with its arguments, ready to be timed."""
        function, fail = getattr(self._library, name), self._fail

        def call() -> None:
            status = function(*arguments)
            if status:
                fail(name, status)

        return call

    def releasing(self, name: str, *arguments: Any) -> Callable[[], None]:
        """The bound call that gives something back. What it fails with is of earlier work, which has told already."""
        function, forget = getattr(self._library, name), self._library.cudaGetLastError

        def call() -> None:
            if function(*arguments):
                forget()

        return call

    def _fail(self, name: str, status: int) -> None:
        self._library.cudaGetLastError()
        raise self.error(name, status)

    def error(self, name: str, status: int) -> DeviceError:
        error_name = self._library.cudaGetErrorName(status).decode("utf-8", "replace")
        meaning = self._library.cudaGetErrorString(status).decode("utf-8", "replace")
        kind, advice = ADVICE.get(error_name, (errors.FAILED, "Run again; if it comes back, report it."))
        text = "CUDA's {} failed with {} ({}): {}. {}".format(name, error_name, status, meaning, advice)
        return DeviceError(text, kind)

    def use_device(self) -> None:
        self.call("cudaSetDevice", self.device)

    def synchronize(self) -> None:
        self.call("cudaDeviceSynchronize")

    def _int(self, name: str, *arguments: int) -> int:
        value = ctypes.c_int()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value

    def _handle(self, name: str, *arguments: Any) -> int:
        value = ctypes.c_void_p()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value or 0

    def version(self) -> str:
        """Such as 12.6."""
        return _version(self._int("cudaRuntimeGetVersion"))

    def driver_version(self) -> str:
        """Newest CUDA that the driver serves."""
        return _version(self._int("cudaDriverGetVersion"))

    def device_count(self) -> int:
        return self._int("cudaGetDeviceCount")

    def attribute(self, name: str) -> int:
        """One of ``ATTRIBUTES`` of this device."""
        return self._int("cudaDeviceGetAttribute", ATTRIBUTES[name], self.device)

    def pci_bus_id(self) -> str:
        """Such as 0000:17:00.0; CUDA's device numbers are not NVML's."""
        text = ctypes.create_string_buffer(32)
        self.call("cudaDeviceGetPCIBusId", text, len(text), self.device)
        return text.value.decode("ascii")

    def memory_bytes(self) -> Dict[str, int]:
        """Device memory, ``free`` and ``total``. On a Jetson the page cache counts as used."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return {"free": free.value, "total": total.value}

    def facts(self) -> Dict[str, Any]:
        """What the device is."""
        values = {name: self.attribute(name) for name in ATTRIBUTES}
        return {
            "runtime_version": self.version(),
            "driver_version": self.driver_version(),
            "device": self.device,
            "pci_bus_id": self.pci_bus_id(),
            "compute_capability": "{compute_capability_major}.{compute_capability_minor}".format(**values),
            "multiprocessors": values["multiprocessors"],
            "integrated": bool(values["integrated"]),
            "max_clock_mhz": values["clock_khz"] / 1000.0,
            "max_memory_clock_mhz": values["memory_clock_khz"] / 1000.0,
            "l2_mib": values["l2_bytes"] / 2.0**20,
            "memory_total_mib": self.memory_bytes()["total"] / 2.0**20,
        }

    def stream(self) -> "Stream":
        return Stream(self, self._handle("cudaStreamCreateWithFlags", 0))

    def event(self, spin: bool = True) -> "Event":
        """A timing event. Waiting for it spins, or sleeps, which lets the clocks of a Jetson fall."""
        flags = EVENT_SPIN if spin else EVENT_BLOCKING
        return Event(self, self._handle("cudaEventCreateWithFlags", flags))

    def device_buffer(self, size_bytes: int) -> "Buffer":
        """Memory of the GPU alone."""
        pointer = self._handle("cudaMalloc", max(1, size_bytes))
        return Buffer(size_bytes, pointer, 0, self.releasing("cudaFree", pointer))

    def pinned_buffer(self, size_bytes: int) -> "Buffer":
        """Memory of the host that asynchronous copies can use."""
        pointer = self._handle("cudaHostAlloc", max(1, size_bytes), HOST_ALLOC_DEFAULT)
        return Buffer(size_bytes, 0, pointer, self.releasing("cudaFreeHost", pointer))

    def shared_buffer(self, size_bytes: int) -> "Buffer":
        """Memory of both, without copies: managed where the device has it, which caches it; mapped otherwise.

        The host must not touch it while the GPU works.
        """
        if self.attribute("managed_memory"):
            pointer = self._handle("cudaMallocManaged", max(1, size_bytes), ATTACH_GLOBAL)
            return Buffer(size_bytes, pointer, pointer, self.releasing("cudaFree", pointer))
        host = self._handle("cudaHostAlloc", max(1, size_bytes), HOST_ALLOC_MAPPED)
        pointer = self._handle("cudaHostGetDevicePointer", host, 0)
        return Buffer(size_bytes, pointer, host, self.releasing("cudaFreeHost", host))

    def copy_in(self, target: "Buffer", source: "Buffer", stream: "Stream") -> Callable[[], None]:
        """A bound copy of all of ``source``, in host memory, to the device."""
        arguments = (target.pointer, source.address, source.size_bytes, HOST_TO_DEVICE, stream.handle)
        return self.bound("cudaMemcpyAsync", *arguments)

    def copy_out(self, target: "Buffer", source: "Buffer", stream: "Stream") -> Callable[[], None]:
        """A bound copy of all of ``source``, in device memory, to the host."""
        arguments = (target.address, source.pointer, source.size_bytes, DEVICE_TO_HOST, stream.handle)
        return self.bound("cudaMemcpyAsync", *arguments)

    def capture(self, stream: "Stream", enqueue: Callable[[], Any]) -> "Graph":
        """What ``enqueue`` puts on ``stream``, as a graph.

        Raises DeviceError, or what ``enqueue`` raises, where the work cannot be captured; the stream works on.
        """
        self.call("cudaStreamBeginCapture", stream.handle, CAPTURE_THREAD_LOCAL)
        try:
            enqueue()
        except Exception:
            self._abandon_capture(stream)
            raise
        graph = ctypes.c_void_p()
        self.call("cudaStreamEndCapture", stream.handle, ctypes.byref(graph))
        try:
            return Graph(self, self._instantiate(graph), stream)
        finally:
            self.call("cudaGraphDestroy", graph)

    def captured(
        self, stream: "Stream", enqueue: Callable[[], Any], warn: Callable[[str], None]
    ) -> Optional["Graph"]:
        """The same after one plain run, as lazy set-up cannot be captured; None, with a warning, where it fails."""
        enqueue()
        stream.synchronize()
        try:
            return self.capture(stream, enqueue)
        except DeviceError as exc:
            warn("The work runs without a CUDA graph, as it cannot be captured: {}".format(exc))
            return None

    def _abandon_capture(self, stream: "Stream") -> None:
        graph = ctypes.c_void_p()
        self._library.cudaStreamEndCapture(stream.handle, ctypes.byref(graph))
        if graph:
            self._library.cudaGraphDestroy(graph)
        self._library.cudaGetLastError()

    def _instantiate(self, graph: ctypes.c_void_p) -> int:
        if hasattr(self._library, "cudaGraphInstantiateWithFlags"):
            return self._handle("cudaGraphInstantiateWithFlags", graph, 0)
        return self._handle("cudaGraphInstantiate", graph, None, None, 0)


class Stream:
    """A queue of work on the device; its methods are bound calls."""

    def __init__(self, cuda: CudaRuntime, handle: int) -> None:
        self.handle = handle
        self.synchronize = cuda.bound("cudaStreamSynchronize", handle)
        self.close = cuda.releasing("cudaStreamDestroy", handle)
        self._cuda = cuda

    def waiting_for(self, event: "Event") -> Callable[[], None]:
        """A bound call: what is enqueued after it starts when ``event`` has happened."""
        return self._cuda.bound("cudaStreamWaitEvent", self.handle, event.handle, 0)


class Event:
    """A point in a stream, with the time at which the device came to it."""

    def __init__(self, cuda: CudaRuntime, handle: int) -> None:
        self.handle = handle
        self.synchronize = cuda.bound("cudaEventSynchronize", handle)
        self.close = cuda.releasing("cudaEventDestroy", handle)
        self._cuda = cuda
        self._elapsed = ctypes.c_float()

    def recording_on(self, stream: Stream) -> Callable[[], None]:
        """A bound call that puts the event on ``stream``."""
        return self._cuda.bound("cudaEventRecord", self.handle, stream.handle)

    def ms_since(self, start: "Event") -> float:
        """Time between two events that have happened, a float32 in milliseconds."""
        self._cuda.call("cudaEventElapsedTime", ctypes.byref(self._elapsed), start.handle, self.handle)
        return self._elapsed.value


class Graph:
    """Captured work; ``launch`` puts all of it on the stream with one call."""

    def __init__(self, cuda: CudaRuntime, handle: int, stream: Stream) -> None:
        self.handle = handle
        self.launch = cuda.bound("cudaGraphLaunch", handle, stream.handle)
        self.close = cuda.releasing("cudaGraphExecDestroy", handle)


class Buffer:
    """Memory until ``close``: ``pointer`` on the device, ``address`` on the host, 0 where it cannot be seen."""

    def __init__(self, size_bytes: int, pointer: int, address: int, free: Callable[[], None]) -> None:
        self.size_bytes = size_bytes
        self.pointer = pointer
        self.address = address
        self.host = _view(address, size_bytes) if address else memoryview(b"")
        self._free = free

    def close(self) -> None:
        """The memory is gone: ``host``, its bytes, must not be used any more."""
        self.host = memoryview(b"")
        self._free()


def _view(address: int, size_bytes: int) -> memoryview:
    """Plain bytes at an address."""
    return memoryview((ctypes.c_ubyte * size_bytes).from_address(address)).cast("B")


def _version(number: int) -> str:
    return "{}.{}".format(number // 1000, number % 1000 // 10)


def load_library(path: Optional[str] = None) -> Tuple[str, Any]:
    """The library's path or name, and the library with its functions declared.

    Raises DeviceError (mismatch) with everything that was tried.
    """
    failures = []
    for candidate in _candidates(path):
        try:
            return candidate, _declared(ctypes.CDLL(candidate))
        except (OSError, AttributeError) as exc:
            failures.append("{}: {}".format(candidate, exc))
    raise DeviceError(
        "No usable libcudart on this machine. Install the CUDA runtime (10.2 or newer), or name the file in the "
        "environment variable {}. Tried: {}".format(PATH_VARIABLE, "; ".join(failures)),
        errors.MISMATCH,
    )


def _candidates(path: Optional[str]) -> Iterator[str]:
    """The named one alone; else one that the engine has loaded already, so that there is one, then the usual."""
    named = path or os.environ.get(PATH_VARIABLE)
    if named:
        yield named
        return
    for found in (_mapped_libraries(), SONAMES, _installed_libraries()):
        yield from found


def _mapped_libraries() -> List[str]:
    try:
        with open("/proc/self/maps") as file:
            found = re.findall(r"/.*/libcudart[^/\n]*\.so[^/\n]*$", file.read(), re.MULTILINE)
    except OSError:
        return []
    return sorted(set(found))


def _installed_libraries() -> List[str]:
    folders = list(FOLDERS)
    folders += [os.path.join(root, folder) for root in sys.path for folder in WHEEL_FOLDERS]
    return [
        path for folder in folders for path in sorted(glob.glob(folder + "/libcudart.so.*"), reverse=True)
    ]


def _declared(library: Any) -> Any:
    for name, arguments in PROTOTYPES.items():
        if name in OPTIONAL_FUNCTIONS and not hasattr(library, name):
            continue
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_char_p if name in TEXT_FUNCTIONS else ctypes.c_int
    return library
