"""The double of the CUDA runtime in this process, through which the double of TensorRT reaches memory and streams."""

import ctypes
import os
import re

ILLEGAL_ADDRESS, LAUNCH_FAILURE = 700, 719
WORK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_loaded = []


def library():
    """Raises RuntimeError when the process has no double of libcudart: a real one cannot serve this double."""
    if not _loaded:
        path = os.environ.get("JETWAY_LIBCUDART") or _mapped()
        found = ctypes.CDLL(path) if path else None
        if found is None or not hasattr(found, "cudartDoubleEnqueue"):
            raise RuntimeError(f"The double of TensorRT needs the double of the CUDA runtime; found {path}.")
        found.cudartDoubleAlias.restype = ctypes.c_void_p
        found.cudartDoubleAlias.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        found.cudartDoubleEnqueue.argtypes = (ctypes.c_void_p, WORK, ctypes.c_void_p)
        found.cudaStreamSynchronize.argtypes = (ctypes.c_void_p,)
        found.cudaStreamIsCapturing.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
        _loaded.append(found)
    return _loaded[0]


def _mapped():
    with open("/proc/self/maps") as file:
        found = re.search(r"/\S*/libcudart[^/\s]*\.so\S*", file.read())
    return found.group() if found else None


def _alias(pointer, size_bytes):
    return library().cudartDoubleAlias(pointer, size_bytes)


def read(pointer, size_bytes):
    """Bytes of device memory, or None where a kernel may not read so many."""
    address = _alias(pointer, size_bytes)
    return ctypes.string_at(address, size_bytes) if address else None


def write(pointer, data):
    """Whether a kernel may write there; if so, they are written."""
    address = _alias(pointer, len(data))
    if address:
        ctypes.memmove(address, data, len(data))
    return bool(address)


def enqueue(stream, work):
    """Puts a WORK on the stream; the caller keeps it alive. Whether CUDA took it."""
    return library().cudartDoubleEnqueue(stream, work, None) == 0


def synchronize(stream):
    return library().cudaStreamSynchronize(stream) == 0


def is_capturing(stream):
    status = ctypes.c_int()
    library().cudaStreamIsCapturing(stream, ctypes.byref(status))
    return status.value != 0
