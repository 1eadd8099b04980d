"""Which units run in integers: the cheapest assignment, by a model of what kernels cost.

The costs are of ONNX Runtime 1.31 on one core of a 2.5 GHz Xeon with AVX-512 VNNI, fitted to chains of
equal layers (8 to 256 channels, 4x4 to 32x32 pixels), differences of 5 layers and 1 so that a session's
own time cancels. Fitted kernels are within 30 % of the measured ones, and where the model decides against
integers (depthwise off multiples of 16, stems of few channels) the measured factors are 1.4 to 5.
Other CPUs differ in the factors and hardly in the order.

Switching costs too: every tensor that crosses pays a quantization or dequantization and a change of layout.
With two sides and costs on units and on crossings, the best assignment is a minimum cut (Greig, Porteous &
Seheult 1989), so it is exact and the same every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from jetway.tasks.lowering.units import COMPUTE, Unit, averages_all_taps, group_count, input_shape
from jetway.tasks.onnx_graph import Graph, Shape, attribute

# Element-wise operators with integer kernels of their own, and those that only move values.
ARITHMETIC = frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu"})
MOVEMENT = frozenset({"MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze"})
INTEGER_COMPUTE = frozenset({"Conv", "Gemm", "MatMul"})
# Their integer kernels give float where nobody wants integers.
FLOAT_OUTPUT = frozenset({"Gemm", "MatMul"})

_BLOCK = 16  # channels of a vector register
_UNIT_US = 0.01  # resolution of the flow's integer capacities
_INFINITE = 2**29

_CALL_US = 2.0
_CROSSING_US_PER_ELEMENT = 0.8e-3
_ELEMENT_US = 0.4e-3
_AVERAGE_POOL_TAP_US = 0.67e-3  # one tap at one element: its integer kernel does them one by one
_INTEGER_MACS_PER_US = 240e3
_INTEGER_GATHER_US = 5e-3  # one kernel tap at one pixel, copied for the matrix product
_FLOAT_MACS_PER_US = 50e3
_FLOAT_UNALIGNED_MACS_PER_US = 37e3
_DEPTHWISE_INTEGER_MACS_PER_US = 18e3
_DEPTHWISE_INTEGER_UNALIGNED_MACS_PER_US = 5e3
_DEPTHWISE_INTEGER_GATHER_US = 2.2e-3
_DEPTHWISE_FLOAT_MACS_PER_US = 18e3


@dataclass(frozen=True)
class Costs:
    """Microseconds of a unit in float and in integers; ``integer`` is None where it has no such kernel."""

    floating: float
    integer: float | None
    reason: str = ""


def unit_costs(unit: Unit, shapes: dict[str, Shape], *, quantized: bool) -> Costs:
    """Estimated costs of one unit. ``quantized`` says whether its input and weight have quantizers."""
    if unit.operator in COMPUTE:
        return _compute_costs(unit, shapes, quantized=quantized)
    if not unit.inputs:
        return Costs(0.0, None, "no activations")
    elements = _elements(shapes.get(unit.output, ()))
    if unit.operator in ARITHMETIC | MOVEMENT | {"Relu"} and _is_integer_capable(unit):
        cost = _CALL_US + elements * _ELEMENT_US
        if unit.operator == "AveragePool":
            return Costs(cost, _average_pool_us(unit, shapes, elements))
        return Costs(cost, cost)
    return Costs(0.0, None, "no integer kernel")


def choose_integer(
    graph: Graph, units: Sequence[Unit], shapes: dict[str, Shape], costs: Sequence[Costs]
) -> list[bool]:
    """For each unit, whether it runs in integers, so that the estimated total is least.

    Graph inputs and outputs are float.
    """
    network = _FlowNetwork()
    sides = [network.add_unit(cost) for cost in costs]
    producers = {unit.output: index for index, unit in enumerate(units)}
    readers: dict[str, list[int]] = {}
    for index, unit in enumerate(units):
        for name in unit.inputs:
            readers.setdefault(name, []).append(sides[index])
    for name in {*readers, *graph.output_names}:
        source = producers.get(name)
        side = network.sink if source is None else sides[source]
        crossing = _crossing_us(shapes.get(name, ()))
        free = source is not None and units[source].operator in FLOAT_OUTPUT
        outside = [network.sink] if name in graph.output_names else []
        network.add_crossing(
            side,
            [*readers.get(name, []), *outside],
            to_integer=crossing,
            to_float=0.0 if free else crossing,
        )
    integer = network.source_side()
    return [side in integer for side in sides]


class _FlowNetwork:
    """Vertices on the source's side of the minimum cut are integer, on the sink's side float."""

    source, sink = 0, 1

    def __init__(self) -> None:
        self._count = 2
        self._edges: dict[tuple[int, int], int] = {}

    def add_unit(self, costs: Costs) -> int:
        side = self._vertex()
        self._edge(self.source, side, costs.floating)
        self._edge(side, self.sink, costs.integer)
        return side

    def add_crossing(self, side: int, readers: list[int], *, to_integer: float, to_float: float) -> None:
        """A tensor made on ``side`` is converted once however many of its readers are on the other side."""
        dequantized, quantized = self._vertex(), self._vertex()
        self._edge(side, dequantized, to_float)
        self._edge(quantized, side, to_integer)
        for reader in readers:
            self._edge(dequantized, reader, None)
            self._edge(reader, quantized, None)

    def source_side(self) -> set[int]:
        edges = [(edge, capacity) for edge, capacity in self._edges.items() if edge[0] != edge[1]]
        rows, columns = np.array([edge for edge, _ in edges], dtype=np.int32).reshape(-1, 2).T
        capacities = np.array([capacity for _, capacity in edges], dtype=np.int32)
        shape = (self._count, self._count)
        graph = csr_array((capacities, (rows, columns)), shape=shape)
        residual = graph - maximum_flow(graph, self.source, self.sink).flow
        residual.eliminate_zeros()
        reached = breadth_first_order(residual, self.source, return_predecessors=False)
        return {int(vertex) for vertex in reached}

    def _vertex(self) -> int:
        self._count += 1
        return self._count - 1

    def _edge(self, start: int, end: int, cost_us: float | None) -> None:
        capacity = _INFINITE if cost_us is None else round(cost_us / _UNIT_US)
        self._edges[start, end] = min(_INFINITE, self._edges.get((start, end), 0) + capacity)


def _compute_costs(unit: Unit, shapes: dict[str, Shape], *, quantized: bool) -> Costs:
    if not quantized:
        return Costs(_float_us(unit, shapes), None, "kept in float: no quantizers")
    if unit.operator not in INTEGER_COMPUTE:
        return Costs(_float_us(unit, shapes), None, f"no integer kernel for {unit.operator}")
    floating, integer = _float_us(unit, shapes), _integer_us(unit, shapes)
    reason = f"integers would cost {integer:.0f} us here, float {floating:.0f} us"
    return Costs(floating, integer, reason if integer > floating else f"{reason}, and conversions on top")


def _float_us(unit: Unit, shapes: dict[str, Shape]) -> float:
    inputs, outputs = _channels(unit, shapes)
    padded = unit.macs * math.ceil(outputs / _BLOCK) * _BLOCK / outputs
    if _is_depthwise(unit, inputs):
        return _CALL_US + padded / _DEPTHWISE_FLOAT_MACS_PER_US
    aligned = unit.operator != "Conv" or inputs % _BLOCK == 0
    return _CALL_US + padded / (_FLOAT_MACS_PER_US if aligned else _FLOAT_UNALIGNED_MACS_PER_US)


def _integer_us(unit: Unit, shapes: dict[str, Shape]) -> float:
    if unit.operator != "Conv":
        return _CALL_US + unit.macs / _INTEGER_MACS_PER_US
    inputs, outputs = _channels(unit, shapes)
    taps = _elements(shapes.get(unit.node.input[1], ())[2:])
    gathers = 0 if taps == 1 else taps * _elements(shapes.get(unit.output, ())) // outputs
    if _is_depthwise(unit, inputs):
        return _depthwise_integer_us(outputs, gathers, unit.macs)
    return _CALL_US + gathers * group_count(unit) * _INTEGER_GATHER_US + unit.macs / _INTEGER_MACS_PER_US


def _average_pool_us(unit: Unit, shapes: dict[str, Shape], elements: int) -> float:
    taps: int = math.prod(attribute(unit.node, "kernel_shape"))
    if not averages_all_taps(unit.node):
        return _CALL_US + elements * taps * _AVERAGE_POOL_TAP_US
    channels = shapes[unit.output][1]
    return _depthwise_integer_us(channels, taps * elements // channels, taps * elements)


def _depthwise_integer_us(channels: int, gathers: int, macs: int) -> float:
    aligned = channels % _BLOCK == 0
    rate = _DEPTHWISE_INTEGER_MACS_PER_US if aligned else _DEPTHWISE_INTEGER_UNALIGNED_MACS_PER_US
    return _CALL_US + gathers * _DEPTHWISE_INTEGER_GATHER_US + macs / rate


def _channels(unit: Unit, shapes: dict[str, Shape]) -> tuple[int, int]:
    inputs, outputs = input_shape(unit, shapes), shapes.get(unit.output, ())
    if unit.operator in ("Gemm", "MatMul"):
        return (inputs[-1] if inputs else 1), (outputs[-1] if outputs else 1)
    return (inputs[1] if len(inputs) > 1 else 1), (outputs[1] if len(outputs) > 1 else 1)


def _is_depthwise(unit: Unit, input_channels: int) -> bool:
    return 1 < group_count(unit) == input_channels


def _is_integer_capable(unit: Unit) -> bool:
    """Two activations for Add and Mul: a constant operand has no quantizer."""
    return len(unit.inputs) == 2 if unit.operator in ("Add", "Mul") else bool(unit.inputs)


def _crossing_us(shape: Shape) -> float:
    return 1.0 + _elements(shape) * _CROSSING_US_PER_ELEMENT


def _elements(shape: Shape) -> int:
    return math.prod(shape)
