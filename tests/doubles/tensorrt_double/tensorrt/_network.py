"""Networks: tensors and layers as the parser makes them from an ONNX file, and the parser itself."""

import os

from tensorrt import _extensions, _native, _onnx, _settings, _values
from tensorrt._values import DataType, ErrorCode, LayerType, TensorFormat, TensorLocation

DATA_TYPES = {
    _onnx.FLOAT: "FLOAT",
    _onnx.UINT8: "UINT8",
    _onnx.INT8: "INT8",
    _onnx.INT32: "INT32",
    _onnx.INT64: "INT64" if _settings.HAS_INT64 else "INT32",
    _onnx.BOOL: "BOOL",
    _onnx.FLOAT16: "HALF",
    _onnx.BFLOAT16: "BF16" if _settings.HAS_BF16 else None,
    11: "FLOAT",
}
LAYER_TYPES = {
    "Conv": "CONVOLUTION",
    "ConvTranspose": "DECONVOLUTION",
    "Gemm": "MATRIX_MULTIPLY",
    "MatMul": "MATRIX_MULTIPLY",
    "BatchNormalization": "SCALE",
    "MaxPool": "POOLING",
    "AveragePool": "POOLING",
    "GlobalAveragePool": "REDUCE",
    "ReduceMean": "REDUCE",
    "ReduceSum": "REDUCE",
    "ReduceMax": "REDUCE",
    "Softmax": "SOFTMAX",
    "Concat": "CONCATENATION",
    "Reshape": "SHUFFLE",
    "Flatten": "SHUFFLE",
    "Transpose": "SHUFFLE",
    "Squeeze": "SHUFFLE",
    "Unsqueeze": "SHUFFLE",
    "Slice": "SLICE",
    "Pad": "SLICE",
    "Gather": "GATHER",
    "Shape": "SHAPE",
    "Resize": "RESIZE",
    "TopK": "TOPK",
    "ArgMax": "TOPK",
    "Constant": "CONSTANT",
    "Identity": "IDENTITY",
    "Cast": "CAST",
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
    "Einsum": "EINSUM",
    "Where": "SELECT",
    "Expand": "SLICE",
    "ConstantOfShape": "FILL",
    "NonZero": "NON_ZERO",
    "InstanceNormalization": "SCALE",
    "LayerNormalization": "NORMALIZATION",
}
LAYER_TYPES.update(
    dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "And", "Or"), "ELEMENTWISE")
)
LAYER_TYPES.update(dict.fromkeys(("Equal", "Greater", "Less"), "ELEMENTWISE"))
LAYER_TYPES.update(
    dict.fromkeys(
        (
            "Relu",
            "LeakyRelu",
            "Clip",
            "Sigmoid",
            "Tanh",
            "HardSigmoid",
            "HardSwish",
            "Elu",
            "Gelu",
            "Softplus",
        ),
        "ACTIVATION",
    )
)
LAYER_TYPES.update(
    dict.fromkeys(("Exp", "Log", "Sqrt", "Neg", "Abs", "Erf", "Floor", "Not", "Reciprocal"), "UNARY")
)
TO_BOOL = {"Equal", "Greater", "Less", "And", "Or", "Not"}
TO_INDEX = {"Shape", "ArgMax", "NonZero"}


class ITensor(_native.Native):
    def _set_up(self, name, dtype, shape, role):
        self._name, self._dtype, self._shape, self._role = name, dtype, shape, role
        self._range = None
        self._location = TensorLocation.DEVICE
        self._formats = 1 << int(TensorFormat.LINEAR)

    @classmethod
    def _of(cls, name, dtype, shape, role=""):
        made = cls._make()
        made._set_up(name, dtype, shape, role)
        return made

    @property
    def name(self):
        return self._name

    @name.setter
    def name(self, value):
        self._name = value

    @property
    def dtype(self):
        return getattr(DataType, self._dtype)

    @dtype.setter
    def dtype(self, value):
        _native.require(value, DataType, "dtype")
        self._dtype = value.name

    @property
    def shape(self):
        return _values.Dims(self._shape)

    @shape.setter
    def shape(self, value):
        self._shape = _values.sizes_of(value)

    @property
    def location(self):
        return self._location

    @location.setter
    def location(self, value):
        self._location = value

    @property
    def allowed_formats(self):
        return self._formats

    @allowed_formats.setter
    def allowed_formats(self, value):
        self._formats = value

    @property
    def is_network_input(self):
        return self._role == "input"

    @property
    def is_network_output(self):
        return self._role == "output"

    @property
    def is_shape_tensor(self):
        return False

    @property
    def is_execution_tensor(self):
        return True

    def set_dynamic_range(self, min, max):
        self._range = (float(min), float(max))
        return True

    def reset_dynamic_range(self):
        self._range = None

    @property
    def dynamic_range(self):
        return self._range

    @dynamic_range.setter
    def dynamic_range(self, value):
        self._range = tuple(value)


class ILayer(_native.Native):
    """One node of the ONNX file. A type that the user sets is a wish: the flags of the build say whether it counts."""

    @classmethod
    def _of(cls, network, node):
        made = cls._make(_network=network, _node=node, _name=node.name, _precision=None, _output_types={})
        made._metadata = f"[ONNX Layer: {node.name}]"
        return made

    @property
    def name(self):
        return self._name

    @name.setter
    def name(self, value):
        self._name = value

    @property
    def metadata(self):
        return self._metadata

    @metadata.setter
    def metadata(self, value):
        self._metadata = value

    @property
    def type(self):
        wanted = LAYER_TYPES.get(self._node.op_type, "PLUGIN_V2")
        return LayerType.__members__.get(wanted, LayerType.IDENTITY)

    @property
    def num_inputs(self):
        return len(self._inputs())

    @property
    def num_outputs(self):
        return len(self._node.outputs)

    def _inputs(self):
        return [name for name in self._node.inputs if name in self._network._tensors]

    def get_input(self, index):
        names = self._inputs()
        return self._network._tensors[names[index]] if index < len(names) else None

    def get_output(self, index):
        return self._network._tensors[self._node.outputs[index]] if index < self.num_outputs else None

    @property
    def precision(self):
        return self._precision or DataType.FLOAT

    @precision.setter
    def precision(self, value):
        _native.require(value, DataType, "precision")
        if self._network._may_set_types():
            self._precision = value

    @property
    def precision_is_set(self):
        return self._precision is not None

    def reset_precision(self):
        self._precision = None

    def set_output_type(self, index, dtype):
        _native.require(dtype, DataType, "set_output_type")
        if self._network._may_set_types():
            self._output_types[index] = dtype

    def output_type_is_set(self, index):
        return index in self._output_types

    def reset_output_type(self, index):
        self._output_types.pop(index, None)

    def get_output_type(self, index):
        return self._output_types.get(index) or self.get_output(index).dtype


class INetworkDefinition(_native.Native):
    """Empty until a parser fills it; layers cannot be added by hand in the double."""

    @classmethod
    def _of(cls, builder, flags):
        return cls._make(
            _builder=builder, _flags=flags, _name="", _tensors={}, _layers=[], _inputs=[], _outputs=[],
            _model=None, _data=b"",
        )  # fmt: skip

    def _has(self, flag):
        known = _values.NetworkDefinitionCreationFlag.__members__.get(flag)
        return known is not None and bool(self._flags >> known.value & 1)

    def _is_strongly_typed(self):
        return _settings.MAJOR >= 11 or self._has("STRONGLY_TYPED")

    def _may_set_types(self):
        if self._is_strongly_typed():
            text = "Error Code 3: API Usage Error (a type was set in a strongly typed network)"
            _extensions.say(self._builder._logger, "ERROR", text)
        return not self._is_strongly_typed()

    @property
    def name(self):
        return self._name

    @name.setter
    def name(self, value):
        self._name = value

    @property
    def builder(self):
        return self._builder

    @property
    def flags(self):
        return self._flags

    def get_flag(self, flag):
        _native.require(flag, _values.NetworkDefinitionCreationFlag, "get_flag")
        return bool(self._flags >> flag.value & 1)

    @property
    def has_implicit_batch_dimension(self):
        return _settings.MAJOR < 10 and not self._has("EXPLICIT_BATCH")

    @property
    def has_explicit_precision(self):
        return self._has("EXPLICIT_PRECISION")

    @property
    def num_layers(self):
        return len(self._layers)

    @property
    def num_inputs(self):
        return len(self._inputs)

    @property
    def num_outputs(self):
        return len(self._outputs)

    def get_layer(self, index):
        return self._layers[index] if 0 <= index < self.num_layers else None

    def get_input(self, index):
        return self._inputs[index] if 0 <= index < self.num_inputs else None

    def get_output(self, index):
        return self._outputs[index] if 0 <= index < self.num_outputs else None

    def _fill(self, model, data):
        """Takes over a parsed model."""
        self._model, self._data, self._name = model, data, model.name
        for value in model.inputs:
            self._inputs.append(
                self._add_tensor(value.name, DATA_TYPES[value.elem_type], value.shape(), "input")
            )
        for node in model.nodes:
            self._add_node(model, node)
        for value in model.outputs:
            tensor = self._tensors[value.name]
            tensor._role, tensor._shape = tensor._role or "output", value.shape()
            self._outputs.append(tensor)

    def _add_tensor(self, name, dtype, shape, role=""):
        self._tensors[name] = ITensor._of(name, dtype, shape, role)
        return self._tensors[name]

    def _add_node(self, model, node):
        for name in filter(None, node.outputs):
            known = model.values.get(name)
            shape = known.shape() if known else ()
            self._add_tensor(name, self._type_of(model, node), shape)
        self._layers.append(ILayer._of(self, node))

    def _type_of(self, model, node):
        """The type of a node's outputs."""
        if node.op_type == "Cast":
            return DATA_TYPES[node.integer("to")]
        if node.op_type == "Constant":
            value = node.tensor("value")
            return DATA_TYPES[value.elem_type] if value else "FLOAT"
        if node.op_type in TO_BOOL:
            return "BOOL"
        if node.op_type in TO_INDEX:
            return DATA_TYPES[_onnx.INT64]
        if node.op_type == "QuantizeLinear":
            return self._input_type(model, node, 2) or "UINT8"
        which = 1 if node.op_type in ("DequantizeLinear", "Where") else 0
        return self._input_type(model, node, which) or "FLOAT"

    def _input_type(self, model, node, index):
        name = node.inputs[index] if index < len(node.inputs) else ""
        if name in model.initializers:
            return DATA_TYPES.get(model.initializers[name].elem_type)
        return self._tensors[name]._dtype if name in self._tensors else None


class ParserError(_native.Native):
    @classmethod
    def _of(cls, code, text, node=None):
        return cls._make(_code=code, _text=text, _node=node)

    def code(self):
        return ErrorCode.__members__.get(self._code, ErrorCode.UNSUPPORTED_NODE)

    def desc(self):
        return self._text

    def file(self):
        return "the double of onnx-tensorrt"

    def func(self):
        return "parseNode"

    def line(self):
        return 1

    def node(self):
        return self._node.index if self._node else -1

    def node_name(self):
        return self._node.name if self._node else ""

    def node_operator(self):
        return self._node.op_type if self._node else ""

    def local_function_stack(self):
        return []

    def local_function_stack_size(self):
        return 0

    def __repr__(self):
        return f"In node {self.node()} ({self.func()}): {self._code}: {self._text}"


class OnnxParser(_native.Native):
    _constructible = True

    def __init__(self, network, logger):
        _native.require(network, INetworkDefinition, "OnnxParser")
        _native.require(logger, _extensions.ILogger, "OnnxParser")
        super().__init__()
        self._network, self._logger, self._errors, self._flags = network, _native.pointer_to(logger), [], 0

    def parse(self, model, path=None):
        """``path`` is the model's file, beside which its external data lies; without one, the current folder."""
        data = bytes(memoryview(model))
        self._errors = []
        try:
            return self._parse(data, os.path.dirname(path or ""))
        except _onnx.NotOnnx as exc:
            return self._fail("MODEL_DESERIALIZE_FAILED", f"Failed to parse the ONNX model: {exc}")

    def parse_from_file(self, model):
        _native.require(model, str, "parse_from_file")
        try:
            with open(model, "rb") as file:
                data = file.read()
        except OSError:
            return self._fail("MODEL_DESERIALIZE_FAILED", f"Failed to open file {model}")
        return self.parse(data, model)

    def _parse(self, data, folder):
        data = _onnx.self_contained(data, folder)
        model = _onnx.Model(data)
        if self._network.has_implicit_batch_dimension:
            return self._fail("INVALID_GRAPH", "This version only supports networks with an explicit batch")
        for node in model.nodes:
            self._check_node(model, node)
        for value in model.inputs:
            self._check_type(value.elem_type, f"input {value.name}")
        if self._errors:
            return False
        self._network._fill(model, data)
        return True

    def _check_node(self, model, node):
        if not self._knows(node):
            text = f"No importer registered for op: {node.op_type}"
            self._fail("UNSUPPORTED_NODE", text, node)
        for name in node.inputs:
            if name in model.initializers:
                self._check_type(model.initializers[name].elem_type, f"tensor {name}", node)
        if node.op_type == "Cast":
            self._check_type(node.integer("to"), f"cast {node.name}", node)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            self._check_zero_point(model, node)

    def _check_type(self, elem_type, what, node=None):
        if DATA_TYPES.get(elem_type) is None:
            text = f"Unsupported ONNX data type {elem_type} of {what}"
            self._fail("UNSUPPORTED_NODE", text, node)

    def _check_zero_point(self, model, node):
        zero_point = model.initializers.get([*node.inputs, "", "", ""][2])
        if zero_point is None and node.op_type == "QuantizeLinear":
            self._fail("UNSUPPORTED_NODE", "Unsupported data type UINT8 of a quantized tensor", node)
        if zero_point is not None and zero_point.elem_type == _onnx.UINT8:
            self._fail("UNSUPPORTED_NODE", "Unsupported data type UINT8 of a quantized tensor", node)
        if zero_point is not None and not zero_point.is_zero():
            self._fail("UNSUPPORTED_NODE", "Non-zero zero point is not supported", node)

    def _knows(self, node):
        return node.domain in ("", "ai.onnx") and self.supports_operator(node.op_type)

    def _fail(self, code, text, node=None):
        self._errors.append(ParserError._of(code, text, node))
        _extensions.say(self._logger, "ERROR", repr(self._errors[-1]))
        return False

    def supports_operator(self, op_name):
        return op_name in LAYER_TYPES and op_name != _settings.faults().get("unsupported")

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        if not 0 <= index < self.num_errors:
            raise IndexError(f"there is no error {index}")
        return self._errors[index]

    def clear_errors(self):
        self._errors = []

    @property
    def flags(self):
        return self._flags

    @flags.setter
    def flags(self, value):
        self._flags = value

    def set_flag(self, flag):
        self._flags |= 1 << int(flag)

    def clear_flag(self, flag):
        self._flags &= ~(1 << int(flag))

    def get_flag(self, flag):
        return bool(self._flags >> int(flag) & 1)
