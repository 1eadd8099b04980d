"""Named tensors in a NumPy .npz file, read and written with the standard library: a target need not have numpy.

Each array is a file of the zip archive: ``\\x93NUMPY``, a version, the length of a header that is a Python literal, and
the values (numpy.lib.format documents it).
"""

import ast
import struct
import zipfile
from typing import Any, Dict

from jetway.tasks.on_device import errors, tensors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensors import Tensor

MAGIC = b"\x93NUMPY"
ALIGNMENT = 64
SUFFIX = ".npy"
#: numpy's names for types; it has none for bf16 and fp8.
DESCRIPTIONS = {
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}
NAMES = {description: name for name, description in DESCRIPTIONS.items()}
# What a file that is none, or is cut off, makes of the calls below.
UNREADABLE = (OSError, ValueError, SyntaxError, KeyError, TypeError, struct.error, zipfile.BadZipFile)


def read(path: str) -> Dict[str, Tensor]:
    """Tensors by name. Raises DeviceError (bad_request) for what is no such file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(SUFFIX)]
            return {name[: -len(SUFFIX)]: _tensor(archive.read(name)) for name in names}
    except UNREADABLE as exc:
        raise DeviceError(
            "{} cannot be read as an .npz file of named arrays: {}. Write one with numpy.savez.".format(
                path, exc
            ),
            errors.BAD_REQUEST,
        )


def _tensor(data: bytes) -> Tensor:
    if not data.startswith(MAGIC):
        raise ValueError("an array in it has no header")
    code, start = ("<H", 10) if data[6] == 1 else ("<I", 12)
    (length,) = struct.unpack_from(code, data, 8)
    header = ast.literal_eval(data[start : start + length].decode("latin-1"))
    _check(header)
    tensor = Tensor(NAMES[header["descr"]], header["shape"], data[start + length :])
    if len(tensor.data) != tensors.count(tensor.shape) * tensors.ITEM_BYTES[tensor.dtype]:
        raise ValueError("an array in it is cut off")
    return tensor


def _check(header: Dict[str, Any]) -> None:
    if header["descr"] not in NAMES:
        raise ValueError("an array in it has the type {!r}".format(header["descr"]))
    if header["fortran_order"]:
        raise ValueError("an array in it is in Fortran order; numpy.ascontiguousarray changes that")


def write(path: str, arrays: Dict[str, Tensor]) -> None:
    """As numpy.savez writes them. Raises DeviceError (mismatch) for a type that numpy lacks."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, tensor in arrays.items():
            entry = zipfile.ZipInfo(name + SUFFIX)  # of 1980: the same arrays give the same file
            archive.writestr(entry, _header(name, tensor) + bytes(tensor.data))


def _header(name: str, tensor: Tensor) -> bytes:
    if tensor.dtype not in DESCRIPTIONS:
        raise DeviceError(
            "{!r} is {}, which an .npz file cannot hold. Let the network return float32.".format(
                name, tensor.dtype
            ),
            errors.MISMATCH,
        )
    text = repr({"descr": DESCRIPTIONS[tensor.dtype], "fortran_order": False, "shape": tensor.shape})
    length = len(MAGIC) + 4 + len(text) + 1
    line = text + " " * (-length % ALIGNMENT) + "\n"
    return MAGIC + b"\x01\x00" + struct.pack("<H", len(line)) + line.encode("latin-1")
