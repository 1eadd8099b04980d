"""Gives each node of a float graph its precision: fp32, fp16 or bf16, with inputs and outputs left in float32.

The ONNX operator schemas say which operands of a node may be of which type, so that the sizes of a Resize or the
scales of an old QuantizeLinear stay as they are. Casts go where precisions meet. A node whose values do not fit
into fp16 on the calibration data stays in fp32 and is listed, as is every constant that had to be clipped:
nothing turns into infinity unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, defs, helper, numpy_helper

from jetway.tasks.onnx_graph import Array, Graph, attribute, node_inputs, set_attribute

ELEMENT_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_TYPE_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "tensor(float)",
    TensorProto.FLOAT16: "tensor(float16)",
    TensorProto.BFLOAT16: "tensor(bfloat16)",
}
_ROUNDING = (TensorProto.BFLOAT16, TensorProto.FLOAT)
FP16_MAX = float(np.finfo(np.float16).max)
#: A larger error of a quantization scale is worse than the rounding to int8 itself.
_SCALE_ERROR = 1 / 512
#: What stands for minus infinity in a mask: sums with it still fit.
_FP16_MASK = -FP16_MAX / 2
FP16_LEAST = float(np.finfo(np.float16).smallest_subnormal)


@dataclass(frozen=True)
class KeptNode:
    """A node that stays in float32, and why."""

    name: str
    operator: str
    reason: str

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "operator": self.operator, "reason": self.reason}


@dataclass
class FloatTypes:
    """What a conversion did: nodes kept in float32, and constants that fp16 cannot hold, by name."""

    kept: list[KeptNode] = field(default_factory=list)
    clipped: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"kept_in_fp32": [node.to_json() for node in self.kept], "clipped_constants": self.clipped}


Ranges = Mapping[str, tuple[float, float]]


def convert_float_types(
    graph: Graph, precision_of: Callable[[NodeProto], str], ranges: Ranges | None = None
) -> FloatTypes:
    """Converts the graph in place. ``precision_of`` names the precision that is wanted for a node.

    ``ranges`` are the least and largest value of tensors on calibration data. Raises ExportError when bf16 is
    wanted of a graph whose operators cannot be brought to the operator set that has it.
    """
    return _Conversion(graph, precision_of, ranges or {}).run()


def at_opset(graph: Graph, opset: int) -> Graph:
    """The graph in a newer operator set, by ONNX's own converter."""
    if graph.opsets.get("", 0) >= opset:
        return graph
    return Graph.from_model(onnx.version_converter.convert_version(graph.to_model(), opset))


def soften_masks(graph: Graph) -> dict[str, float]:
    """Gives masks, constants of nothing but 0 and values far below fp16 such as -1e9, a value that fp16 holds.

    Else every softmax behind one would have to stay in float32. Returns what the constants reached, by name.
    """
    softened = {}
    for name, array in graph.constants.items():
        if array.dtype == np.float32:
            values = array[np.isfinite(array) & (array != 0)]
            if values.size and values.max() < -FP16_MAX:
                softened[name] = float(np.abs(values).max())
                graph.constants[name] = np.where(array < 0, np.maximum(array, np.float32(_FP16_MASK)), array)
    return softened


def emulate_bf16(graph: Graph) -> Graph:
    """The graph with float32 operators whose every result is rounded to bfloat16, changed in place."""
    types = graph.element_types()
    for name, array in graph.constants.items():
        if helper.np_dtype_to_tensor_dtype(array.dtype) == TensorProto.BFLOAT16:
            graph.constants[name] = array.astype(np.float32)
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        nodes.append(node)
        if node.op_type == "Cast" and attribute(node, "to") == TensorProto.BFLOAT16:
            set_attribute(node, "to", TensorProto.FLOAT)
        for index, name in enumerate(node.output):
            if types.get(name) == TensorProto.BFLOAT16:
                node.output[index] = f"{name}_exact"
                steps = [f"{name}_exact", f"{name}_rounded", name]
                for to, (source, result) in zip(_ROUNDING, pairwise(steps), strict=True):
                    nodes.append(
                        helper.make_node("Cast", [source], [result], name=f"{result}_emulated", to=to)
                    )
    graph.nodes = nodes
    return graph


def float_tensors(graph: Graph) -> list[str]:
    """Names of the tensors inside the graph that hold float32 and are not constant."""
    types = graph.element_types()
    made = [name for node in graph.nodes for name in node.output if name]
    return [name for name in [*graph.input_names, *made] if types.get(name) == TensorProto.FLOAT]


class _Conversion:
    """One pass over the nodes in order. ``_types`` follows the element type that each tensor has by now."""

    def __init__(self, graph: Graph, precision_of: Callable[[NodeProto], str], ranges: Ranges) -> None:
        self._graph = graph
        self._precision_of = precision_of
        self._ranges = ranges
        self._types = {**graph.element_types(), **_constant_types(graph)}
        self._nodes: list[NodeProto] = []
        self._casts: dict[tuple[str, int], str] = {}
        self._captured = _captured(graph)
        self._report = FloatTypes()

    def run(self) -> FloatTypes:
        for node in self._graph.nodes:
            wanted = ELEMENT_TYPES[self._precision_of(node)]
            reason = "" if wanted == TensorProto.FLOAT else self._obstacle(node, wanted)
            if reason:
                self._report.kept.append(KeptNode(node.name or node.output[0], node.op_type, reason))
            self._convert(node, TensorProto.FLOAT if reason else wanted)
        for name in self._graph.output_names:
            self._restore_output(name)
        self._graph.nodes = self._nodes
        return self._report

    def _obstacle(self, node: NodeProto, wanted: int) -> str:
        """Why the node cannot have the wanted type; empty when it can."""
        if not self._float_operands(node):
            return ""
        if any(entry.g.node or entry.graphs for entry in node.attribute):
            return "it holds a graph of its own"
        if self._captured.intersection(node.output):
            return "a graph inside another node reads what it makes"
        schema = self._schema(node)
        if schema is None:
            return f"{node.op_type} is no operator of ONNX"
        if attribute(node, "dtype") == TensorProto.FLOAT:
            return "its attribute dtype asks for float32"
        if not any(_may_be(schema, formal, wanted) for formal in self._float_formals(node, schema)):
            return f"{node.op_type} has no {_TYPE_NAMES[wanted]} form in this opset"
        return self._misfit(node) if wanted == TensorProto.FLOAT16 else ""

    def _misfit(self, node: NodeProto) -> str:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = self._graph.constants.get(node.input[1], np.ones(1, np.float32)).astype(np.float64)
            error = np.abs(scale.astype(np.float16) / scale - 1).max()
            if error > _SCALE_ERROR:
                return f"its scale {scale.min():.3g} is too small for fp16"
        return self._overflow(node)

    def _overflow(self, node: NodeProto) -> str:
        for name in [*node_inputs(node), *node.output]:
            low, high = self._ranges.get(name, (0.0, 0.0))
            largest = max(abs(low), abs(high))
            if not largest <= FP16_MAX:
                return f"{name} reaches {largest:.3g} on the calibration data, fp16 ends at {FP16_MAX:g}"
        return ""

    def _convert(self, node: NodeProto, wanted: int) -> None:
        schema = self._schema(node)
        for index, name in enumerate(node.input):
            if name and self._types.get(name) in _TYPE_NAMES:
                formal = _formal(schema.inputs, index) if schema else None
                free = schema is None or formal is None or not _may_be(schema, formal, wanted)
                node.input[index] = self._as(name, TensorProto.FLOAT if free else wanted, node)
        self._convert_attributes(node, wanted)
        self._nodes.append(node)
        for index, name in enumerate(node.output):
            if self._types.get(name) == TensorProto.FLOAT and schema is not None:
                formal = _formal(schema.outputs, index)
                if _may_be(schema, formal, wanted) and not _is_statistic(node, index):
                    self._types[name] = wanted

    def _convert_attributes(self, node: NodeProto, wanted: int) -> None:
        """The two operators whose result has the type that an attribute names."""
        if node.op_type == "Cast" and attribute(node, "to") == TensorProto.FLOAT:
            set_attribute(node, "to", wanted)
        if node.op_type == "ConstantOfShape" and self._types.get(node.output[0]) == TensorProto.FLOAT:
            value = attribute(node, "value")
            array = numpy_helper.to_array(value) if value is not None else np.zeros(1, np.float32)
            set_attribute(
                node, "value", numpy_helper.from_array(self._rounded(node.output[0], array, wanted))
            )

    def _as(self, name: str, wanted: int, node: NodeProto) -> str:
        """The tensor in the wanted type: itself, a converted constant, or a cast that its readers share."""
        if self._types[name] == wanted or node.op_type in _ANY_FLOAT:
            return name
        if (name, wanted) not in self._casts:
            constant = self._graph.constants.get(name)
            if constant is not None:
                converted = self._fresh(name, wanted)
                self._graph.constants[converted] = self._rounded(name, constant, wanted)
            else:
                converted = self._fresh(name, wanted)
                self._nodes.append(
                    helper.make_node("Cast", [name], [converted], name=f"{converted}_cast", to=wanted)
                )
            self._types[converted] = wanted
            self._casts[name, wanted] = converted
        return self._casts[name, wanted]

    def _rounded(self, name: str, array: Array, wanted: int) -> Array:
        """The constant in the wanted type. fp16 takes its own largest value for what is beyond it, and its
        least one for what would become 0, such as an epsilon under a division."""
        dtype = helper.tensor_dtype_to_np_dtype(wanted)
        if wanted != TensorProto.FLOAT16:
            return array.astype(dtype)
        finite = np.isfinite(array)
        fitting = np.where(finite, np.clip(array, -FP16_MAX, FP16_MAX), array)
        if (fitting != array)[finite].any():
            self._report.clipped[name] = float(np.abs(array[finite]).max())
        tiny = (array != 0) & (np.abs(array) < FP16_LEAST / 2)
        return np.where(tiny, np.sign(array) * FP16_LEAST, fitting).astype(dtype)

    def _restore_output(self, name: str) -> None:
        """Graph outputs stay float32 under their own names."""
        if self._types.get(name) not in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            return
        inner = self._fresh(name, self._types[name])
        for node in self._nodes:
            for names in (node.input, node.output):
                for index, used in enumerate(names):
                    if used == name:
                        names[index] = inner
        self._nodes.append(
            helper.make_node("Cast", [inner], [name], name=f"{name}_cast", to=TensorProto.FLOAT)
        )

    def _fresh(self, name: str, element_type: int) -> str:
        """A new name for another form of a tensor."""
        new = f"{name}_{_suffix(element_type)}"
        while new in self._types or new in self._graph.constants:
            new += "_"
        return new

    def _float_operands(self, node: NodeProto) -> bool:
        return any(self._types.get(name) in _TYPE_NAMES for name in [*node_inputs(node), *node.output])

    def _float_formals(self, node: NodeProto, schema: Any) -> Iterator[Any]:
        for formals, names in ((schema.inputs, node.input), (schema.outputs, node.output)):
            for index, name in enumerate(names):
                if self._types.get(name) in _TYPE_NAMES:
                    yield _formal(formals, index)

    def _schema(self, node: NodeProto) -> Any:
        try:
            return defs.get_schema(node.op_type, self._graph.opsets.get(node.domain, 1), node.domain)
        except defs.SchemaError:
            return None


#: They read any float type, and casting their input would only cost.
_ANY_FLOAT = frozenset({"Cast", "CastLike", "Shape", "Size", "IsNaN"})


def _captured(graph: Graph) -> set[str]:
    """Tensors that graphs inside nodes take from outside."""
    return {name for node in graph.nodes for name in set(node_inputs(node)) - set(node.input)}


def _is_statistic(node: NodeProto, index: int) -> bool:
    """Mean and deviation of a normalization keep float32, whatever the data."""
    return node.op_type == "LayerNormalization" and index > 0


def _formal(formals: Any, index: int) -> Any:
    """The formal parameter of an operand; the last one may be variadic."""
    return formals[min(index, len(formals) - 1)]


def _may_be(schema: Any, formal: Any, wanted: int) -> bool:
    constraints = {entry.type_param_str: entry.allowed_type_strs for entry in schema.type_constraints}
    return _TYPE_NAMES[wanted] in constraints.get(formal.type_str, [formal.type_str])


def _constant_types(graph: Graph) -> dict[str, int]:
    return {
        name: helper.np_dtype_to_tensor_dtype(array.dtype)
        for name, array in graph.constants.items()
        if array.dtype == np.float32
    }


def _suffix(wanted: int) -> str:
    return next(name for name, element_type in ELEMENT_TYPES.items() if element_type == wanted)
