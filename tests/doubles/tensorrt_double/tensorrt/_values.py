"""Values: enums that the double itself uses, dimensions, and memory that TensorRT hands out."""

from tensorrt import _native, _settings, _surface


def _enum(name):
    values = _surface.enum_values(name, _settings.SURFACE_VERSION)
    return _native.make_enum(name, values) if values else None


BuilderFlag = _enum("BuilderFlag")
CalibrationAlgoType = _enum("CalibrationAlgoType")
DataType = _enum("DataType")
DeviceType = _enum("DeviceType")
EngineCapability = _enum("EngineCapability")
ErrorCode = _enum("ErrorCode")
HardwareCompatibilityLevel = _enum("HardwareCompatibilityLevel")
LayerInformationFormat = _enum("LayerInformationFormat")
LayerType = _enum("LayerType")
MemoryPoolType = _enum("MemoryPoolType")
NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag")
ProfilingVerbosity = _enum("ProfilingVerbosity")
Severity = _native.make_enum("Severity", _surface.enum_values("Logger.Severity", _settings.SURFACE_VERSION))
TacticSource = _enum("TacticSource")
TensorFormat = _enum("TensorFormat")
TensorIOMode = _enum("TensorIOMode")
TensorLocation = _enum("TensorLocation")

DATA_TYPE_ALIASES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
    "uint8": "UINT8",
    "fp8": "FP8",
    "int4": "INT4",
    "fp4": "FP4",
    "e8m0": "E8M0",
}
NUMPY_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
}
ITEM_BYTES = {
    "FLOAT": 4,
    "HALF": 2,
    "BF16": 2,
    "INT8": 1,
    "INT32": 4,
    "INT64": 8,
    "BOOL": 1,
    "UINT8": 1,
    "FP8": 1,
}
# How the inspector writes a type.
SHORT_NAMES = {
    "FLOAT": "FP32",
    "HALF": "FP16",
    "INT8": "Int8",
    "INT32": "Int32",
    "INT64": "Int64",
    "BOOL": "Bool",
}

if _settings.NUMBER >= (8, 6):
    DataType.itemsize = property(lambda self: ITEM_BYTES.get(self.name))


class Dims(_native.Native):
    """Sizes of a shape. It is no tuple, equals only tuples and lists, and cannot be hashed."""

    _constructible = True
    MAX_DIMS = property(lambda self: 8)

    def __init__(self, shape=()):
        super().__init__()
        self._sizes = sizes_of(shape)

    def __len__(self):
        return len(self._sizes)

    def __getitem__(self, index):
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError("Out of bounds")
        return self._sizes[index]

    def __eq__(self, other):
        if not isinstance(other, (list, tuple)):
            raise TypeError("__eq__(): incompatible function arguments")
        return self._sizes == tuple(other)

    __hash__ = None

    def __repr__(self):
        return str(self._sizes)


def sizes_of(shape):
    """The sizes of a tuple, a list or Dims, all integers; anything else is refused as pybind11 does."""
    if not isinstance(shape, (tuple, list, Dims)):
        raise TypeError(f"incompatible function arguments: {shape!r} is no Dims")
    for size in shape:
        _native.require(size, int, "Dims")
    return tuple(shape)


class IHostMemory(bytes):
    """Bytes that TensorRT made. Only the buffer and these two are TensorRT's; the rest of bytes is not."""

    @property
    def nbytes(self):
        return len(self)

    @property
    def dtype(self):
        return DataType.INT8


IHostMemory.__module__ = "tensorrt.tensorrt"
