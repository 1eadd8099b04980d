"""Named arrays in a safetensors file, read and written with the standard library.

The file is eight bytes of header length, a JSON header, and the arrays' bytes. The host uses the safetensors
package for the same files; a target has none. numpy is imported when arrays are handed over.
"""

import json
import os
import struct
from typing import Any, Dict, Iterator, List, Tuple

from jetway.tasks.on_device import outputs
from jetway.tasks.on_device.errors import BAD_REQUEST, DeviceError

NUMPY_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}
SAFETENSORS_NAMES = {numpy_name: name for name, numpy_name in NUMPY_NAMES.items()}
MAX_HEADER_BYTES = 100 * 1024 * 1024


def read_header(path: str) -> Tuple[Dict[str, Any], int]:
    """Entries of the file by name, and the offset of the first array's bytes."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError("its header claims {} bytes".format(length))
            header = json.loads(file.read(length).decode("utf-8"))
    except (OSError, ValueError, struct.error) as exc:
        raise DeviceError(
            "Cannot read the tensors in {}: {}. Run again to send the file anew.".format(path, exc),
            BAD_REQUEST,
        )
    header.pop("__metadata__", None)
    return header, 8 + length


def read_tensors(path: str) -> Dict[str, Any]:
    """Arrays by name, mapped from the file and read-only: memory is used as they are touched."""
    import numpy as np

    header, start = read_header(path)
    arrays = {}
    for name, entry in header.items():
        dtype = np.dtype(_numpy_name(entry["dtype"], name, path)).newbyteorder("<")
        shape = tuple(entry["shape"])
        if 0 in shape:
            arrays[name] = np.zeros(shape, dtype)
            continue
        offset = start + entry["data_offsets"][0]
        flat = np.memmap(path, dtype, "r", offset, (_count(shape),))
        arrays[name] = flat.reshape(shape)
    return arrays


def _numpy_name(dtype: str, name: str, path: str) -> str:
    if dtype not in NUMPY_NAMES:
        raise DeviceError(
            "Tensor {!r} in {} is {}, which numpy does not have. Let the workload give one of: {}.".format(
                name, path, dtype, ", ".join(sorted(NUMPY_NAMES))
            ),
            BAD_REQUEST,
        )
    return NUMPY_NAMES[dtype]


def _count(shape: Tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class TensorWriter:
    """Writes arrays as they come and holds none: ``with TensorWriter(path) as w: w.add(name, array)``.

    The file appears under its name when the block ends well, and not at all when it fails.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._header = {}  # type: Dict[str, Any]
        self._offset = 0
        self._data_path = outputs.scratch_path(os.path.basename(path) + ".data")
        self._data = None  # type: Any

    def __enter__(self) -> "TensorWriter":
        self._data = open(self._data_path, "w+b")
        return self

    def add(self, name: str, array: Any) -> None:
        """Appends a numpy array."""
        data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        self.add_bytes(name, SAFETENSORS_NAMES[array.dtype.name], list(array.shape), data)

    def add_bytes(self, name: str, dtype: str, shape: List[int], data: bytes) -> None:
        """Appends little-endian bytes; ``dtype`` is safetensors' name, such as I64."""
        self._header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [self._offset, self._offset + len(data)],
        }
        self._data.write(data)
        self._offset += len(data)

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        temporary = outputs.scratch_path(os.path.basename(self.path) + ".part")
        try:
            if exc_type is None:
                self._data.seek(0)
                with open(temporary, "wb") as file:
                    file.write(_header_bytes(self._header))
                    for chunk in _chunks(self._data):
                        file.write(chunk)
                os.replace(temporary, self.path)
        finally:
            self._data.close()
            for leftover in (self._data_path, temporary):
                if os.path.exists(leftover):
                    os.unlink(leftover)


def _header_bytes(header: Dict[str, Any]) -> bytes:
    """The header, padded with spaces so that the arrays start at a multiple of eight bytes."""
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _chunks(file: Any) -> Iterator[bytes]:
    while True:
        chunk = file.read(1 << 20)
        if not chunk:
            return
        yield chunk
