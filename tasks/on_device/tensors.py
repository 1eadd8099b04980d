"""Named tensors in a safetensors file, read and written with the standard library.

The file is eight bytes of header length, a JSON header, and the tensors' bytes. The host uses the safetensors
package for the same files; a target has none. A tensor here is a type, a shape and bytes; numpy, which a target
need not have, is imported by those who ask for its arrays.
"""

import json
import mmap
import os
import struct
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Tuple

from jetway.tasks.on_device import outputs
from jetway.tasks.on_device.errors import BAD_REQUEST, DeviceError

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
#: The struct module's letters.
CODES = {
    "BOOL": "B",
    "U8": "B",
    "I8": "b",
    "U16": "H",
    "I16": "h",
    "F16": "e",
    "U32": "I",
    "I32": "i",
    "F32": "f",
    "U64": "Q",
    "I64": "q",
    "F64": "d",
}
#: Types whose values can be given as another of the family.
FAMILIES = (("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"), ("F16", "F32", "F64"))
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


class Tensor:
    """Type (safetensors' name, such as F32), shape, and the bytes in C order, little-endian."""

    def __init__(self, dtype: str, shape: Sequence[int], data: Any) -> None:
        self.dtype = dtype
        self.shape = tuple(shape)
        self.data = memoryview(data).cast("B")

    @classmethod
    def of(cls, value: Any) -> "Tensor":
        """Of a tensor, or of a numpy array."""
        if isinstance(value, cls):
            return value
        array = value.astype(value.dtype.newbyteorder("<"), order="C", copy=False)
        return cls(SAFETENSORS_NAMES[array.dtype.name], array.shape, array.tobytes())

    def rows(self, start: int, stop: int) -> "Tensor":
        """A part of the first dimension; the bytes are shared. Beyond the end, the last row is repeated."""
        row_bytes = len(self.data) // self.shape[0]
        last = min(stop, self.shape[0])
        data = self.data[start * row_bytes : last * row_bytes]  # type: Any
        if stop > last:
            data = bytes(data) + bytes(self.data[(last - 1) * row_bytes : last * row_bytes]) * (stop - last)
        return Tensor(self.dtype, (stop - start,) + self.shape[1:], data)

    def cast(self, dtype: str) -> "Tensor":
        """The same values as another integer, or another float. Raises DeviceError where that cannot be."""
        if dtype == self.dtype:
            return self
        if not any({dtype, self.dtype} <= set(family) for family in FAMILIES):
            raise DeviceError("{} cannot be given as {}.".format(self, dtype), BAD_REQUEST)
        values = self.values()
        try:
            data = struct.pack("<{}{}".format(len(values), CODES[dtype]), *values)
        except (struct.error, OverflowError) as exc:
            raise DeviceError("A value of {} does not fit {}: {}.".format(self, dtype, exc), BAD_REQUEST)
        return Tensor(dtype, self.shape, data)

    def values(self) -> List[Any]:
        """The elements as Python's numbers, in C order."""
        return list(struct.unpack(_format(self), self.data))

    def numpy(self) -> Any:
        """An array over the same bytes."""
        import numpy as np

        if self.dtype not in NUMPY_NAMES:
            raise DeviceError(
                "numpy has no {}. Let the workload give one of: {}.".format(
                    self.dtype, ", ".join(sorted(NUMPY_NAMES))
                ),
                BAD_REQUEST,
            )
        dtype = np.dtype(NUMPY_NAMES[self.dtype]).newbyteorder("<")
        return np.ndarray(self.shape, dtype, self.data)

    def __str__(self) -> str:
        return "{}{}".format(self.dtype, list(self.shape))


def _format(tensor: Tensor) -> str:
    if tensor.dtype not in CODES:
        raise DeviceError("{} cannot be converted.".format(tensor), BAD_REQUEST)
    return "<{}{}".format(count(tensor.shape), CODES[tensor.dtype])


def count(shape: Sequence[int]) -> int:
    """Elements of a tensor of that shape."""
    product = 1
    for size in shape:
        product *= size
    return product


def read_tensors(path: str) -> Dict[str, Tensor]:
    """Tensors by name, mapped from the file and read-only: memory is used as they are touched."""
    header, start = read_header(path)
    with open(path, "rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return {name: _tensor(name, entry, mapped[start:], path) for name, entry in header.items()}


def _tensor(name: str, entry: Dict[str, Any], mapped: memoryview, path: str) -> Tensor:
    first, last = entry["data_offsets"]
    if entry["dtype"] not in ITEM_BYTES:
        raise DeviceError(
            "Tensor {!r} in {} is {}. Let the workload give one of: {}.".format(
                name, path, entry["dtype"], ", ".join(sorted(ITEM_BYTES))
            ),
            BAD_REQUEST,
        )
    size_bytes = count(entry["shape"]) * ITEM_BYTES[entry["dtype"]]
    if last - first != size_bytes or last > len(mapped):
        raise DeviceError(
            "Cannot read the tensors in {}: {!r} should have {} bytes. Run again to send the file anew.".format(
                path, name, size_bytes
            ),
            BAD_REQUEST,
        )
    return Tensor(entry["dtype"], entry["shape"], mapped[first:last])


def picked(names: Iterable[str], given: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The tensors of an engine's inputs. Raises DeviceError (bad_request) where one is missing."""
    wanted = list(names)
    missing = sorted(set(wanted) - set(given))
    if missing:
        raise DeviceError(
            "The engine takes the inputs {}, and {} were not given. Name them in the workload's "
            "example_inputs.".format(sorted(wanted), missing),
            BAD_REQUEST,
        )
    return {name: given[name] for name in wanted}


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

    def add(self, name: str, value: Any) -> None:
        """Appends a tensor or a numpy array."""
        tensor = Tensor.of(value)
        self.add_bytes(name, tensor.dtype, list(tensor.shape), tensor.data)

    def add_bytes(self, name: str, dtype: str, shape: List[int], data: Any) -> None:
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
