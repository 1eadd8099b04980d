"""Explicit Q/DQ read back as a float graph with ranges, and that graph as units of work.

A unit is one operator with the activation that its kernel can absorb. An engine decides unit by unit what
runs in integers; the ranges say how.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto, TensorProto

from jetway.tasks.errors import ExportError
from jetway.tasks.onnx_graph import (
    INT8_MAX,
    Graph,
    Shape,
    attribute,
    count_macs,
    node_inputs,
    quantized_weight,
)

COMPUTE = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_ABSORBING = frozenset({"Conv", "Gemm", "Add"})


@dataclass(frozen=True)
class FloatForm:
    """A graph whose activations are float again; quantized weights still hang on DequantizeLinear.

    ``ranges`` has the largest magnitude of each tensor that was quantized, ``quantized`` the outputs of the
    layers whose input and weight were quantized.
    """

    graph: Graph
    ranges: dict[str, float]
    quantized: frozenset[str]


@dataclass(frozen=True)
class Limits:
    """What an absorbed activation lets through; ``upper`` is None for Relu."""

    lower: float
    upper: float | None


@dataclass(frozen=True, eq=False)
class Unit:
    """An operator and the activation after it. ``inputs`` are activations only: no constants, no shapes or indices."""

    node: NodeProto
    activation: NodeProto | None
    limits: Limits | None
    inputs: tuple[str, ...]
    macs: int

    @property
    def operator(self) -> str:
        return str(self.node.op_type)

    @property
    def name(self) -> str:
        return str(self.node.name or self.node.output[0])

    @property
    def output(self) -> str:
        return str((self.activation or self.node).output[0])


def to_float_form(graph: Graph) -> FloatForm:
    """Removes the quantizers of activations, in place. Raises ExportError for one that is not symmetric."""
    ranges: dict[str, float] = {}
    fed: set[str] = set()
    consumers = graph.consumers()
    for node in [node for node in graph.nodes if node.op_type == "QuantizeLinear"]:
        tensor = node.input[0]
        ranges[tensor] = max(ranges.get(tensor, 0.0), _symmetric_scale(graph, node) * INT8_MAX)
        for dequantize in consumers.get(node.output[0], []):
            fed.update(reader.output[0] for reader in consumers.get(dequantize.output[0], []))
            graph.replace_uses(dequantize.output[0], tensor)
            graph.remove([dequantize])
        graph.remove([node])
    quantized = frozenset(
        node.output[0]
        for node in graph.nodes
        if node.op_type in COMPUTE and node.output[0] in fed and quantized_weight(graph, node.input[1])
    )
    return FloatForm(graph=graph, ranges=ranges, quantized=quantized)


def find_units(graph: Graph, shapes: dict[str, Shape]) -> list[Unit]:
    """The graph's operators in order, but for the DequantizeLinear of weights."""
    consumers = graph.consumers()
    constants = set(graph.constants) | {node.output[0] for node in weight_nodes(graph)}
    others = constants | {name for name, kind in graph.element_types().items() if kind != TensorProto.FLOAT}
    units: list[Unit] = []
    absorbed: set[int] = set()
    for node in graph.nodes:
        if node.output[0] in constants or id(node) in absorbed:
            continue
        activation = _next_activation(graph, node, consumers)
        limits = _limits(graph, activation) if activation is not None else None
        if activation is not None and limits is not None:
            absorbed.add(id(activation))
        inputs = tuple(dict.fromkeys(name for name in node_inputs(node) if name not in others))
        units.append(
            Unit(node, activation if limits else None, limits, inputs, macs=count_macs(node, shapes))
        )
    return units


def weight_nodes(graph: Graph) -> list[NodeProto]:
    """The DequantizeLinear nodes of constants."""
    return [
        node
        for node in graph.nodes
        if node.op_type == "DequantizeLinear" and node.input[0] in graph.constants
    ]


def _symmetric_scale(graph: Graph, node: NodeProto) -> float:
    scale, zero = (graph.constants.get(name) for name in node.input[1:3])
    if scale is None or scale.ndim > 0 or zero is None or zero.any():
        raise ExportError(
            f"{node.name} quantizes {node.input[0]!r} in a way that the lowering does not know. Give it Q/DQ "
            "with one constant scale and zero point 0, as Jetway's export writes it."
        )
    return float(scale)


def _next_activation(
    graph: Graph, node: NodeProto, consumers: dict[str, list[NodeProto]]
) -> NodeProto | None:
    """The Relu or Clip that is the only reader of an operator whose kernels can absorb it."""
    readers = consumers.get(node.output[0], [])
    if node.op_type not in _ABSORBING or len(readers) != 1 or node.output[0] in graph.output_names:
        return None
    return readers[0] if readers[0].op_type in ("Relu", "Clip") else None


def _limits(graph: Graph, node: NodeProto) -> Limits | None:
    """Limits of a Relu, or of a Clip that starts at 0 as ReLU6 does; None for any other Clip."""
    if node.op_type == "Relu":
        return Limits(0.0, None)
    if len(node.input) < 3 or not all(name in graph.constants for name in node.input[1:3]):
        return None
    lower, upper = (float(graph.constants[name]) for name in node.input[1:3])
    return Limits(lower, upper) if lower == 0.0 < upper else None


def input_shape(unit: Unit, shapes: dict[str, Shape]) -> Shape:
    return shapes.get(unit.inputs[0], ()) if unit.inputs else ()


def group_count(unit: Unit) -> int:
    return int(attribute(unit.node, "group", 1))


def averages_all_taps(node: NodeProto) -> bool:
    """Whether every output of an AveragePool is the sum of its taps by one number, so that it is a convolution."""
    pads_count = bool(attribute(node, "count_include_pad", 0)) or not any(attribute(node, "pads", []))
    plain = attribute(node, "auto_pad", b"NOTSET") == b"NOTSET" and not attribute(node, "ceil_mode", 0)
    return pads_count and plain and len(attribute(node, "kernel_shape")) == 2
