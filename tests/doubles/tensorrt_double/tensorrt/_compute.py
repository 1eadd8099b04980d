"""What an "engine" of the double gives: ONNX Runtime's outputs on the CPU, else a pattern made from the inputs."""

import hashlib
import struct
import warnings

from tensorrt import _onnx, _settings

ORT_TYPES = {_onnx.FLOAT: "float32", _onnx.FLOAT16: "float16", _onnx.INT32: "int32", _onnx.INT64: "int64"}
ORT_TYPES.update({_onnx.INT8: "int8", _onnx.UINT8: "uint8", _onnx.BOOL: "bool"})
FORMATS = {"FLOAT": "f", "HALF": "e", "INT8": "b", "INT32": "i", "INT64": "q", "BOOL": "?", "UINT8": "B"}
FATAL_ONLY = 4


class Network:
    """Runs the ONNX bytes. ``note`` says why the outputs are a pattern, or is empty."""

    def __init__(self, data):
        self.model = _onnx.Model(data)
        self.note = ""
        self._session = self._load(data) if _settings.may_use_onnxruntime() else None

    def _load(self, data):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import onnxruntime
        except ImportError:
            return None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = FATAL_ONLY
        for candidate in (data, _onnx.in_float32(data)):
            try:
                return onnxruntime.InferenceSession(candidate, options, providers=["CPUExecutionProvider"])
            except Exception as exc:
                self.note = f"the double cannot run this network, its outputs are a pattern: {exc}"
        return None

    def run(self, inputs, outputs):
        """``{name: (shape, bytes)}`` from such inputs; ``outputs`` are {name: (dtype, shape or None)}."""
        if self._session is None:
            return {name: _pattern(name, *wanted, inputs=inputs) for name, wanted in outputs.items()}
        self.note = ""
        return self._run_onnxruntime(inputs, outputs)

    def _run_onnxruntime(self, inputs, outputs):
        import numpy as np

        feeds = {}
        for value in self.model.inputs:
            shape, data = inputs[value.name]
            array = np.frombuffer(data, np.dtype(_engine_type(value.elem_type))).reshape(shape)
            feeds[value.name] = array.astype(ORT_TYPES[value.elem_type])
        names = list(outputs)
        arrays = self._session.run(names, feeds)
        return {name: _as_bytes(array, outputs[name][0]) for name, array in zip(names, arrays)}


def _engine_type(elem_type):
    """The type in the engine's buffers: TensorRT 8 has no int64."""
    if elem_type == _onnx.INT64 and not _settings.HAS_INT64:
        return "int32"
    return ORT_TYPES[elem_type]


def _as_bytes(array, dtype):
    import numpy as np

    if _settings.faults().get("wrong_outputs") is not None:
        array = array + np.ones((), array.dtype)
    names = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "BOOL": "bool"}
    wanted = dict(names, INT64="int64", UINT8="uint8")[dtype]
    return tuple(array.shape), np.ascontiguousarray(array.astype(wanted)).tobytes()


def _pattern(name, dtype, shape, inputs):
    """Values that follow from the inputs and the output's name alone, in (-1, 1) or 0 and 1."""
    digest = hashlib.sha256(name.encode())
    for key in sorted(inputs):
        digest.update(inputs[key][1])
    seed = digest.digest()
    if _settings.faults().get("wrong_outputs") is not None:
        seed = seed[::-1]
    count = 1
    for size in shape:
        count *= size
    numbers = [seed[index % 32] ^ (index // 32 & 255) for index in range(count)]
    values = [number / 128.0 - 1 if dtype in ("FLOAT", "HALF") else number & 1 for number in numbers]
    return tuple(shape), struct.pack(f"<{count}{FORMATS[dtype]}", *values)
