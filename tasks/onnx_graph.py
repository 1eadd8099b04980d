"""An ONNX graph that is easy to rewrite, and the rewrites every export needs.

Nodes stay in topological order, constants are numpy arrays by name. ``to_model`` drops what nothing uses and
writes the same bytes for the same graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

PRODUCER = "jetway"
MS_DOMAIN = "com.microsoft"
INT8_MAX = 127

_COMPUTE = ("Conv", "ConvTranspose", "Gemm")


@dataclass
class Graph:
    nodes: list[NodeProto]
    constants: dict[str, Array]
    inputs: list[ValueInfoProto]
    outputs: list[ValueInfoProto]
    opsets: dict[str, int]
    ir_version: int
    _serial: int = field(default=0, repr=False)

    @classmethod
    def from_model(cls, model: ModelProto) -> Graph:
        """Constant nodes become constants. Initializers that are inputs too are constants only."""
        graph = model.graph
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        nodes = []
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            else:
                nodes.append(node)
        return cls(
            nodes=nodes,
            constants=constants,
            inputs=[value for value in graph.input if value.name not in constants],
            outputs=list(graph.output),
            opsets={entry.domain: entry.version for entry in model.opset_import},
            ir_version=model.ir_version,
        )

    @classmethod
    def load(cls, path: Path) -> Graph:
        return cls.from_model(onnx.load(path))

    def to_model(self) -> ModelProto:
        self.drop_unused()
        used = {name for node in self.nodes for name in node_inputs(node)} | set(self.output_names)
        graph = helper.make_graph(
            self.nodes,
            PRODUCER,
            self.inputs,
            self.outputs,
            [numpy_helper.from_array(self.constants[name], name) for name in self.constants if name in used],
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        model: ModelProto = helper.make_model(
            graph, producer_name=PRODUCER, opset_imports=opsets, ir_version=self.ir_version
        )
        return model

    @property
    def input_names(self) -> list[str]:
        return [value.name for value in self.inputs]

    @property
    def output_names(self) -> list[str]:
        return [value.name for value in self.outputs]

    def producers(self) -> dict[str, NodeProto]:
        """The node that makes each tensor."""
        return {name: node for node in self.nodes for name in node.output if name}

    def consumers(self) -> dict[str, list[NodeProto]]:
        """The nodes that read each tensor."""
        found: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node_inputs(node)):
                found.setdefault(name, []).append(node)
        return found

    def shapes(self) -> dict[str, Shape]:
        """Shapes of the tensors that shape inference knows; an open dimension counts as 1."""
        shapes = {value.name: _shape(value) for value in self._inferred()}
        constants = {name: tuple(array.shape) for name, array in self.constants.items()}
        return {name: shape for name, shape in shapes.items() if shape is not None} | constants

    def element_types(self) -> dict[str, int]:
        """ONNX element types of the tensors that are not constants."""
        return {value.name: value.type.tensor_type.elem_type for value in self._inferred()}

    def _inferred(self) -> list[ValueInfoProto]:
        model = self.to_model()
        for value in (*model.graph.input, *model.graph.output):
            _close(value)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        return [*inferred.input, *inferred.value_info, *inferred.output]

    def replace_uses(self, old: str, new: str) -> None:
        """Lets every node that reads ``old`` read ``new``. A graph output keeps its name."""
        for node in self.nodes:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new

    def remove(self, nodes: list[NodeProto]) -> None:
        gone = {id(node) for node in nodes}
        self.nodes = [node for node in self.nodes if id(node) not in gone]

    def add_constant(self, hint: str, value: Array) -> str:
        """Stores a constant under a new name that starts with ``hint``."""
        name = hint
        while name in self.constants:
            self._serial += 1
            name = f"{hint}_{self._serial}"
        self.constants[name] = value
        return name

    def drop_unused(self) -> None:
        """Removes the nodes whose outputs nothing reads."""
        needed = set(self.output_names)
        kept = []
        for node in reversed(self.nodes):
            if any(name in needed for name in node.output):
                needed.update(node_inputs(node))
                kept.append(node)
        self.nodes = kept[::-1]


def node_inputs(node: NodeProto) -> Iterator[str]:
    """Tensors that a node reads, those that its subgraphs take from outside included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for subgraph in [attribute.g, *attribute.graphs] if attribute.name else []:
            own = {name for inner in subgraph.node for name in inner.output}
            own |= {value.name for value in (*subgraph.input, *subgraph.initializer)}
            for inner in subgraph.node:
                yield from (name for name in node_inputs(inner) if name not in own)
            yield from (value.name for value in subgraph.output if value.name not in own)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    for entry in node.attribute:
        if entry.name == name:
            return helper.get_attribute_value(entry)
    return default


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    kept = [entry for entry in node.attribute if entry.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def count_macs(node: NodeProto, shapes: dict[str, Shape]) -> int:
    """Multiply-accumulates of a convolution or matrix product; 0 for every other node."""
    if not node.output or node.output[0] not in shapes or len(node.input) < 2:
        return 0
    output, weight = shapes[node.output[0]], shapes.get(node.input[1])
    if weight is None:
        return 0
    if node.op_type in ("Conv", "FusedConv"):
        return _size(output) * _size(weight[1:])
    if node.op_type == "ConvTranspose":
        return _size(shapes.get(node.input[0], ())) * _size(weight[1:])
    if node.op_type == "Gemm":
        return _size(output) * weight[1 if attribute(node, "transB", 0) else 0]
    if node.op_type == "MatMul":
        return _size(output) * weight[-2 if len(weight) > 1 else 0]
    return 0


def fold_constants(graph: Graph) -> None:
    """Evaluates what the exporter leaves between constants: Identity, Cast, Transpose and, so that the file
    is small, the QuantizeLinear of a weight, which becomes an int8 constant."""
    _share_identities(graph)
    _drop_vain_casts(graph)
    for node in list(graph.nodes):
        folded = _folded(graph, node)
        if folded is not None:
            graph.constants[node.output[0]] = folded
            graph.remove([node])
    _transpose_quantized_weights(graph)


def fold_batchnorms(graph: Graph) -> int:
    """Folds each BatchNorm after a convolution or linear layer into its weight and bias.

    A quantized weight keeps its integers: only the scale of each channel changes, and its sign where the
    BatchNorm's factor is negative. Returns how many were folded; one that follows anything else stays.
    """
    folded = 0
    for node in [node for node in graph.nodes if node.op_type == "BatchNormalization"]:
        layer = graph.producers().get(node.input[0])
        if layer is not None and _is_foldable(graph, node, layer):
            _fold_batchnorm(graph, node, layer)
            folded += 1
    return folded


def quantized_weight(graph: Graph, name: str) -> NodeProto | None:
    """The DequantizeLinear that makes this tensor from an int8 constant, if one does."""
    node = graph.producers().get(name)
    is_weight = node is not None and node.op_type == "DequantizeLinear" and node.input[0] in graph.constants
    return node if is_weight else None


def dequantize(graph: Graph, node: NodeProto) -> Array:
    """Float value of a DequantizeLinear of constants."""
    quantized, scale = graph.constants[node.input[0]], graph.constants[node.input[1]]
    axis = attribute(node, "axis", 1)
    return (quantized.astype(np.float32) * _along(scale, axis, quantized.ndim)).astype(np.float32)


def _folded(graph: Graph, node: NodeProto) -> Array | None:
    constants = graph.constants
    if not node.input or any(name and name not in constants for name in node.input):
        return None
    if len(node.output) != 1 or node.output[0] in graph.output_names:
        return None
    values = [constants[name] for name in node.input if name]
    if node.op_type == "Cast":
        return values[0].astype(helper.tensor_dtype_to_np_dtype(attribute(node, "to")))
    if node.op_type == "Transpose":
        return np.ascontiguousarray(values[0].transpose(attribute(node, "perm")))
    if node.op_type == "QuantizeLinear" and values[2].dtype == np.int8:
        return _quantize(values[0], values[1], attribute(node, "axis", 1))
    return None


def _quantize(weight: Array, scale: Array, axis: int) -> Array:
    ratio = weight.astype(np.float32) / _along(scale, axis, weight.ndim)
    return np.clip(np.rint(ratio), -INT8_MAX - 1, INT8_MAX).astype(np.int8)


def _share_identities(graph: Graph) -> None:
    """The exporter stores equal tensors once and gives the others an Identity."""
    for node in [node for node in graph.nodes if node.op_type == "Identity"]:
        if node.output[0] not in graph.output_names and node.input[0] in graph.constants:
            graph.replace_uses(node.output[0], node.input[0])
            graph.remove([node])


def _drop_vain_casts(graph: Graph) -> None:
    """A cast to the type that the tensor has already."""
    types = graph.element_types()
    for node in [node for node in graph.nodes if node.op_type == "Cast"]:
        if types.get(node.input[0]) == attribute(node, "to") and node.output[0] not in graph.output_names:
            graph.replace_uses(node.output[0], node.input[0])
            graph.remove([node])


def _transpose_quantized_weights(graph: Graph) -> None:
    """Linear layers of more than two dimensions transpose their weight at run time: do it here."""
    for node in [node for node in graph.nodes if node.op_type == "Transpose"]:
        dequantize_node = quantized_weight(graph, node.input[0])
        if dequantize_node is None or node.output[0] in graph.output_names:
            continue
        perm = attribute(node, "perm")
        stored, scale, zero = dequantize_node.input
        turned = np.ascontiguousarray(graph.constants[stored].transpose(perm))
        name = graph.add_constant(f"{stored}_transposed", turned)
        axis = perm.index(attribute(dequantize_node, "axis", 1) % len(perm))
        new = helper.make_node(
            "DequantizeLinear", [name, scale, zero], [node.output[0]], name=f"{name}_dequantize", axis=axis
        )
        graph.nodes[_index(graph, node)] = new


def _is_foldable(graph: Graph, batchnorm: NodeProto, layer: NodeProto) -> bool:
    if layer.op_type not in _COMPUTE or layer.output[0] in graph.output_names:
        return False
    if len(graph.consumers()[layer.output[0]]) > 1 or attribute(batchnorm, "training_mode", 0):
        return False
    plain = layer.op_type != "Gemm" or (
        attribute(layer, "alpha", 1.0) == 1.0 and attribute(layer, "beta", 1.0) == 1.0
    )
    grouped = layer.op_type == "ConvTranspose" and attribute(layer, "group", 1) > 1
    statistics = all(name in graph.constants for name in batchnorm.input[1:])
    bias = len(layer.input) < 3 or not layer.input[2] or layer.input[2] in graph.constants
    weight = layer.input[1] in graph.constants or quantized_weight(graph, layer.input[1]) is not None
    return plain and not grouped and statistics and bias and weight


def _fold_batchnorm(graph: Graph, batchnorm: NodeProto, layer: NodeProto) -> None:
    """Ioffe & Szegedy 2015, section 3.1: at inference BatchNorm is one linear transform a channel."""
    gamma, beta, mean, variance = (graph.constants[name].astype(np.float64) for name in batchnorm.input[1:5])
    factor = gamma / np.sqrt(variance + attribute(batchnorm, "epsilon", 1e-5))
    _scale_weight(graph, layer, factor)
    old = graph.constants[layer.input[2]] if len(layer.input) > 2 and layer.input[2] else np.zeros_like(mean)
    dtype = graph.constants[batchnorm.input[1]].dtype
    bias = (beta + (old - mean) * factor).astype(dtype)
    name = graph.add_constant(f"{layer.output[0]}_bias", bias)
    del layer.input[2:]
    layer.input.append(name)
    layer.output[0] = batchnorm.output[0]
    graph.remove([batchnorm])


def _scale_weight(graph: Graph, layer: NodeProto, factor: Array) -> None:
    """Multiplies each output channel of the layer's weight, which may be shared, by its factor."""
    axis = _output_axis(layer)
    node = quantized_weight(graph, layer.input[1])
    if node is None:
        weight = graph.constants[layer.input[1]]
        scaled = (weight * _along(factor, axis, weight.ndim)).astype(weight.dtype)
        layer.input[1] = graph.add_constant(f"{layer.input[1]}_folded", scaled)
        return
    stored, scale = graph.constants[node.input[0]], graph.constants[node.input[1]]
    sign = _along(np.where(factor < 0, -1, 1), axis, stored.ndim)
    flipped = np.clip(stored.astype(np.int32) * sign, -INT8_MAX - 1, INT8_MAX).astype(np.int8)
    scales = _positive((np.broadcast_to(scale, factor.shape) * np.abs(factor)).astype(np.float32))
    if not factor.all():
        flipped = flipped * _along((factor != 0).astype(np.int8), axis, stored.ndim)
    inputs = [
        graph.add_constant(f"{node.input[0]}_folded", flipped),
        graph.add_constant(f"{node.input[1]}_folded", scales),
        graph.add_constant(f"{node.input[1]}_zero", np.zeros(len(scales), np.int8)),
    ]
    output = f"{inputs[0]}_dequantized"
    new = helper.make_node("DequantizeLinear", inputs, [output], name=f"{output}_node", axis=axis)
    graph.nodes.insert(_index(graph, layer), new)
    layer.input[1] = output


def _positive(scales: Array) -> Array:
    """Engines refuse a scale of 0; the weights of such a channel are zeroed instead."""
    return np.where(scales > 0, scales, np.float32(1.0))


def _output_axis(layer: NodeProto) -> int:
    if layer.op_type == "Conv":
        return 0
    return 1 if layer.op_type == "ConvTranspose" or not attribute(layer, "transB", 0) else 0


def _along(vector: Array, axis: int, rank: int) -> Array:
    """The vector shaped to broadcast along one axis; a scalar as it is."""
    return (
        vector if vector.ndim == 0 else vector.reshape([-1 if i == axis % rank else 1 for i in range(rank)])
    )


def _index(graph: Graph, node: NodeProto) -> int:
    return next(i for i, other in enumerate(graph.nodes) if other is node)


def _close(value: ValueInfoProto) -> None:
    for dim in value.type.tensor_type.shape.dim:
        if not dim.HasField("dim_value"):
            dim.dim_value = 1


def _shape(value: ValueInfoProto) -> Shape | None:
    tensor = value.type.tensor_type
    known = tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)
    return tuple(dim.dim_value for dim in tensor.shape.dim) if known else None


def _size(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))
