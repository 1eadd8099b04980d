"""Q/DQ as TensorRT wants it, rewritten as ONNX Runtime's CPU kernels want it.

TensorRT fuses a convolution with the add and the activation after it, so Q/DQ sit on inputs and weights only.
ONNX Runtime has an integer kernel for each operator instead, which needs every tensor between them quantized:
activations as uint8, convolution outputs and adds too, biases as int32, and ReLU done by saturation at zero
point 0. What does not pay in integers stays float, as an island (``placement``), and ranges that no quantizer
gave come from the calibration data (``ranges``).

On a CPU without VNNI the uint8 × int8 kernels saturate; ``session.x64quantprecision`` = 1, which only such a
CPU heeds, lets ONNX Runtime use uint8 × uint8 there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from jetway.tasks.lowering.placement import (
    FLOAT_OUTPUT,
    MOVEMENT,
    Costs,
    choose_integer,
    unit_costs,
)
from jetway.tasks.lowering.ranges import (
    Affine,
    between,
    non_negative,
    observe_ranges,
    steps_of_int8,
    symmetric,
)
from jetway.tasks.lowering.units import (
    COMPUTE,
    FloatForm,
    Unit,
    averages_all_taps,
    find_units,
    to_float_form,
)
from jetway.tasks.onnx_graph import (
    MS_DOMAIN,
    Array,
    Graph,
    Shape,
    attribute,
    dequantize,
    quantized_weight,
    set_attribute,
)

# Largest bias in units of its scale: what a sum of products may reach besides it still fits into int32.
_BIAS_LIMIT = 2.0**30

# QAT moves a tensor's largest value a little, which is not yet a range that cuts.
_SLIGHTLY_BEYOND = 0.1

# ONNX Runtime's own float operators with an activation inside.
FUSED = {"Conv": "FusedConv", "Gemm": "FusedGemm"}


@dataclass(frozen=True)
class Island:
    """A layer that stays in float, and why."""

    name: str
    operator: str
    macs: int
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "operator": self.operator, "macs": self.macs, "reason": self.reason}


@dataclass(frozen=True)
class Lowered:
    """The rewritten graph, its float layers, and the share of MACs that integer kernels will do."""

    graph: Graph
    islands: tuple[Island, ...]
    integer_macs_ratio: float


def lower_for_onnxruntime(
    graph: Graph, feeds: Iterable[dict[str, Array]], *, threads: int = 1, trained: bool = False
) -> Lowered:
    """Lowers an exported int8 graph. ``feeds`` are calibration inputs by name, each with its batch dimension.

    ``trained`` says that the network was trained with its quantizers. It has then come to rely on what they cut off
    and on what their steps round away. Layers in float cut their inputs off too, where the calibration data reach
    beyond. Of values that cannot be negative, uint8 can keep one of the two at no cost: it
    ends where the quantizer does, with steps half as large, if the calibration data reach beyond, and keeps the steps
    if they do not. Else, the steps are always half as large.
    The given graph is used up. Raises ExportError when its Q/DQ are not those of Jetway's export.
    """
    form = to_float_form(graph)
    shapes = _weight_shapes(form.graph) | form.graph.shapes()
    units = find_units(form.graph, shapes)
    form.ranges.update(_ranges_before_movement(form, units))
    costs = [unit_costs(unit, shapes, quantized=unit.node.output[0] in form.quantized) for unit in units]
    integer = choose_integer(form.graph, units, shapes, costs)
    plan = _Plan(form.graph, units, integer, shapes)
    in_float = _quantized_in_training(form, plan) if trained else []
    observed = observe_ranges(
        form.graph, [*_to_observe(form, plan, trained=trained), *in_float], feeds, threads=threads
    )
    affine = _affine(form, plan, observed, trained=trained)
    cut_off = {name: form.ranges[name] for name in in_float if _is_cut_off(form, name, observed[name])}
    _Emitter(plan, affine, cut_off).rewrite()
    return Lowered(form.graph, _islands(units, integer, costs), _integer_ratio(units, integer))


@dataclass
class _Plan:
    """Which tensors exist in which form."""

    graph: Graph
    units: list[Unit]
    integer: list[bool]
    shapes: dict[str, Shape]
    #: Tensors that integer units make or read.
    quantized: list[str] = field(default_factory=list)
    #: Tensors that an integer unit makes and float units, or the graph's outputs, read too.
    dequantized: set[str] = field(default_factory=set)
    #: Tensors that an integer unit hands on in float, without a quantized form.
    float_made: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        read_integer = {name for unit, flag in self._pairs() if flag for name in unit.inputs}
        read_float = {name for unit, flag in self._pairs() if not flag for name in unit.inputs}
        read_float.update(self.graph.output_names)
        made = {unit.output: unit for unit, flag in self._pairs() if flag}
        self.float_made = {
            name for name, unit in made.items() if unit.operator in FLOAT_OUTPUT and name not in read_integer
        }
        self.dequantized = (set(made) & read_float) - self.float_made
        order = [*self.graph.input_names, *(unit.output for unit in self.units)]
        self.quantized = [
            name for name in order if name in read_integer or (name in made and name not in self.float_made)
        ]

    def _pairs(self) -> list[tuple[Unit, bool]]:
        return list(zip(self.units, self.integer, strict=True))


def _weight_shapes(graph: Graph) -> dict[str, Shape]:
    return {
        node.output[0]: tuple(graph.constants[node.input[0]].shape)
        for node in graph.nodes
        if node.op_type == "DequantizeLinear"
    }


def _ranges_before_movement(form: FloatForm, units: list[Unit]) -> dict[str, float]:
    """Ranges of tensors that are only moved before they are quantized: they are cut off where the quantizer cuts,
    which a network that was trained with it relies on."""
    read = Counter(name for unit in units for name in unit.inputs) + Counter(form.graph.output_names)
    ranges: dict[str, float] = {}
    for unit in reversed(units):
        known = form.ranges.get(unit.output, ranges.get(unit.output))
        if unit.operator in MOVEMENT and known is not None and read[unit.inputs[0]] == 1:
            ranges[unit.inputs[0]] = min(known, form.ranges.get(unit.inputs[0], known))
    return ranges


def _to_observe(form: FloatForm, plan: _Plan, *, trained: bool) -> list[str]:
    """Quantized tensors whose range no quantizer gave, or which a quantizer may cut off."""
    positive = _non_negative_tensors(plan.units) if trained else set()
    return [name for name in plan.quantized if name not in form.ranges or name in positive]


def _quantized_in_training(form: FloatForm, plan: _Plan) -> list[str]:
    """Inputs that layers in float get from layers in float, and that had a quantizer."""
    names = {
        unit.inputs[0]
        for unit, integer in zip(plan.units, plan.integer, strict=True)
        if not integer and unit.node.output[0] in form.quantized and unit.inputs[0] in form.ranges
    }
    return sorted(names - plan.dequantized)


def _is_cut_off(form: FloatForm, name: str, observed: tuple[float, float]) -> bool:
    return max(-observed[0], observed[1]) > form.ranges[name] * (1 + _SLIGHTLY_BEYOND)


def _affine(
    form: FloatForm, plan: _Plan, observed: dict[str, tuple[float, float]], *, trained: bool
) -> dict[str, Affine]:
    """Scale and zero point of every quantized tensor. Operators that only move values keep their input's."""
    makers = {unit.output: (unit, flag) for unit, flag in zip(plan.units, plan.integer, strict=True)}
    positive = _non_negative_tensors(plan.units)
    affine: dict[str, Affine] = {}
    for name in plan.quantized:
        unit, integer = makers.get(name, (None, False))
        if unit is not None and integer and unit.operator in MOVEMENT:
            affine[name] = affine[unit.inputs[0]]
            continue
        upper = form.ranges[name] if name in form.ranges else observed[name][1]
        limit = unit.limits.upper if unit is not None and unit.limits is not None else None
        cut_off = name in form.ranges and name in observed and _is_cut_off(form, name, observed[name])
        if name in positive and name in form.ranges and trained and limit is None and not cut_off:
            affine[name] = steps_of_int8(upper)
        elif name in positive:
            affine[name] = non_negative(upper if limit is None else min(upper, limit))
        else:
            affine[name] = symmetric(upper) if name in form.ranges else between(*observed[name])
    return affine


def _non_negative_tensors(units: list[Unit]) -> set[str]:
    """Tensors that cannot be negative, whatever the input."""
    positive: set[str] = set()
    keeping = MOVEMENT | {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"}
    for unit in units:
        starts = unit.limits is not None or unit.operator in ("Relu", "Sigmoid")
        only_activations = len(unit.inputs) == len([name for name in unit.node.input if name])
        keeps = unit.operator in keeping and (only_activations or unit.operator in MOVEMENT)
        if starts or (keeps and unit.inputs and all(name in positive for name in unit.inputs)):
            positive.add(unit.output)
    return positive


@dataclass(frozen=True)
class _Bias:
    """The addition of a constant to a product."""

    unit: Unit
    constant: str


class _Emitter:
    """Writes the nodes of the lowered graph in order."""

    def __init__(self, plan: _Plan, affine: dict[str, Affine], cut_off: dict[str, float]) -> None:
        self._plan, self._affine, self._cut_off = plan, affine, cut_off
        self._graph = plan.graph
        self._nodes: list[NodeProto] = []
        self._parameters: dict[str, list[str]] = {}
        #: Additions of a bias that the product before them has done, by their output.
        self._added: set[str] = set()

    def rewrite(self) -> None:
        for name in self._graph.input_names:
            if name in self._affine:
                self._quantize(name, name)
        for unit, integer in zip(self._plan.units, self._plan.integer, strict=True):
            if integer:
                self._emit_integer(unit)
            else:
                self._emit_float(unit)
        self._graph.nodes = self._nodes
        self._graph.drop_unused()

    def _emit_integer(self, unit: Unit) -> None:
        if self._is_float_product(unit):
            self._emit_float_product(unit)
            return
        node = NodeProto()
        node.CopyFrom(unit.node)
        for index, name in enumerate(node.input):
            if name in self._affine and name in unit.inputs:
                node.input[index] = self._dequantize(name, f"{name}_for_{unit.name}_{index}")
        if unit.operator in COMPUTE:
            self._quantize_parameters(unit, node)
        elif unit.operator == "AveragePool" and averages_all_taps(node):
            node = self._as_convolution(unit, node)
        if unit.output in self._plan.float_made:
            self._nodes += [node, *_activation(unit)]
            return
        node.output[0] = f"{unit.output}_computed"
        self._nodes.append(node)
        self._quantize(node.output[0], unit.output)
        if unit.output in self._plan.dequantized:
            self._dequantize(unit.output, unit.output)

    def _emit_float(self, unit: Unit) -> None:
        weight = quantized_weight(self._graph, unit.node.input[1]) if unit.operator in COMPUTE else None
        if weight is not None:
            value = dequantize(self._graph, weight)
            unit.node.input[1] = self._graph.add_constant(f"{weight.input[0]}_float", value)
            unit.node.input[0] = self._as_trained(unit.node.input[0])
        self._nodes += _activation(unit) if unit.output in self._added else self._guarded(unit)
        if unit.output in self._affine:
            self._quantize(unit.output, unit.output)

    def _as_trained(self, name: str) -> str:
        """What a layer in float reads instead, if its quantizer cut something off in training."""
        if name not in self._cut_off:
            return name
        output, upper = f"{name}_cut_off", self._cut_off[name]
        if not any(node.output[0] == output for node in self._nodes):
            limits = [
                self._graph.add_constant(f"{output}_{side}", np.array(limit, dtype=np.float32))
                for side, limit in (("below", -upper), ("above", upper))
            ]
            self._nodes.append(helper.make_node("Clip", [name, *limits], [output], name=output))
        return output

    def _is_float_product(self, unit: Unit) -> bool:
        """Whether a MatMul of integers by a matrix of weights is to give float."""
        if unit.operator != "MatMul" or unit.output not in self._plan.float_made:
            return False
        weight = quantized_weight(self._graph, unit.node.input[1])
        assert weight is not None
        values, scales = (self._graph.constants[name] for name in weight.input[:2])
        return values.ndim == 2 and (scales.ndim == 0 or attribute(weight, "axis", 1) == 1)

    def _emit_float_product(self, unit: Unit) -> None:
        """ONNX Runtime would join a MatMul and its bias into a Gemm before it looks at Q/DQ, and compute in float."""
        source, weight = unit.inputs[0], quantized_weight(self._graph, unit.node.input[1])
        assert weight is not None
        scale, zero = self._scale_and_zero(source)
        inputs = [f"{source}_quantized", weight.input[0], scale, weight.input[1], zero, ""]
        bias = self._bias_after(unit)
        if bias is not None:
            inputs.append(bias.constant)
            self._added.add(bias.unit.output)
        output = bias.unit.node.output[0] if bias is not None else unit.output
        self._graph.opsets[MS_DOMAIN] = 1
        self._nodes.append(
            helper.make_node("MatMulIntegerToFloat", inputs, [output], name=unit.name, domain=MS_DOMAIN)
        )

    def _bias_after(self, unit: Unit) -> _Bias | None:
        """The addition of one constant a column that is the only reader of a product."""
        readers = [reader for reader in self._plan.units if unit.output in reader.inputs]
        if len(readers) != 1 or readers[0].operator != "Add" or unit.output in self._graph.output_names:
            return None
        constants = [name for name in readers[0].node.input if name in self._graph.constants]
        if len(constants) != 1 or self._graph.constants[constants[0]].ndim != 1:
            return None
        return _Bias(readers[0], constants[0])

    def _guarded(self, unit: Unit) -> list[NodeProto]:
        """The unit's own nodes, but in a form that ONNX Runtime leaves in float.

        It gives a Conv, ConvTranspose or Gemm between Q/DQ per-tensor int8 weights of its own making
        (its WeightBiasQuantization). The fused operators it leaves alone, and what an Add follows.
        """
        fused = _fused(unit)
        if fused is not None:
            self._graph.opsets[MS_DOMAIN] = 1
            return [fused]
        if unit.operator == "ConvTranspose" and len(unit.node.input) > 2 and unit.node.input[2]:
            return self._with_separate_bias(unit)
        return [unit.node, *_activation(unit)]

    def _with_separate_bias(self, unit: Unit) -> list[NodeProto]:
        node, bias, output = unit.node, unit.node.input[2], unit.output
        rank = len(attribute(node, "kernel_shape", (1, 1))) + 2
        shaped = self._graph.constants[bias].reshape([1, -1, *[1] * (rank - 2)])
        name = self._graph.add_constant(f"{bias}_shaped", shaped)
        del node.input[2:]
        node.output[0] = f"{output}_unbiased"
        add = helper.make_node("Add", [node.output[0], name], [output], name=f"{unit.name}_bias")
        return [node, add]

    def _quantize_parameters(self, unit: Unit, node: NodeProto) -> None:
        """Gives the layer a weight DequantizeLinear of its own, and its bias as int32."""
        source = quantized_weight(self._graph, unit.node.input[1])
        assert source is not None
        weight = NodeProto()
        weight.CopyFrom(source)
        weight.name = f"{unit.name}_weight"
        weight.output[0] = f"{unit.output}_weight"
        node.input[1] = weight.output[0]
        self._nodes.append(weight)
        if len(node.input) > 2 and node.input[2] in self._graph.constants:
            node.input[2] = self._integer_bias(unit, weight, self._graph.constants[node.input[2]])

    def _as_convolution(self, unit: Unit, pool: NodeProto) -> NodeProto:
        """The average as a depthwise convolution of equal weights, whose integer kernel is several times faster."""
        kernel = attribute(pool, "kernel_shape")
        channels = self._plan.shapes[unit.output][1]
        parameters = [
            self._graph.add_constant(f"{unit.output}_ones", np.ones((channels, 1, *kernel), dtype=np.int8)),
            self._graph.add_constant(
                f"{unit.output}_share", np.full(channels, 1 / np.prod(kernel), dtype=np.float32)
            ),
            self._graph.add_constant(f"{unit.output}_ones_zero", np.zeros(channels, dtype=np.int8)),
        ]
        weight = f"{unit.output}_weight"
        self._nodes.append(helper.make_node("DequantizeLinear", parameters, [weight], name=weight, axis=0))
        window = {
            name: attribute(pool, name)
            for name in ("kernel_shape", "strides", "pads", "dilations")
            if attribute(pool, name) is not None
        }
        return helper.make_node(
            "Conv", [pool.input[0], weight], list(pool.output), name=unit.name, group=channels, **window
        )

    def _integer_bias(self, unit: Unit, weight: NodeProto, bias: Array) -> str:
        """The bias in units of input scale × weight scale, as the sums of products come."""
        inputs = self._affine[unit.inputs[0]].scale
        weight.input[1] = self._scale_for_bias(weight, bias, inputs)
        scales = (self._graph.constants[weight.input[1]] * np.float32(inputs)).astype(np.float32)
        value = np.clip(np.rint(bias / scales), -_BIAS_LIMIT, _BIAS_LIMIT).astype(np.int32)
        names = [
            self._graph.add_constant(f"{unit.output}_bias_int32", value),
            self._graph.add_constant(f"{unit.output}_bias_scale", scales),
            self._graph.add_constant(f"{unit.output}_bias_zero", np.zeros_like(scales, dtype=np.int32)),
        ]
        output = f"{names[0]}_dequantized"
        node = helper.make_node("DequantizeLinear", names, [output], name=output)
        if scales.ndim:
            set_attribute(node, "axis", 0)
        self._nodes.append(node)
        return output

    def _scale_for_bias(self, weight: NodeProto, bias: Array, input_scale: float) -> str:
        """Weight scales, raised where a channel without weights would have its bias overflow int32."""
        scale = self._graph.constants[weight.input[1]]
        least = (np.abs(bias) / (_BIAS_LIMIT * input_scale)).astype(np.float32)
        if scale.ndim == 0 or bool((scale >= least).all()):
            return str(weight.input[1])
        return self._graph.add_constant(f"{weight.input[1]}_raised", np.maximum(scale, least))

    def _quantize(self, tensor: str, name: str) -> None:
        output = f"{name}_quantized"
        inputs = [tensor, *self._scale_and_zero(name)]
        self._nodes.append(helper.make_node("QuantizeLinear", inputs, [output], name=output))

    def _dequantize(self, name: str, output: str) -> str:
        inputs = [f"{name}_quantized", *self._scale_and_zero(name)]
        self._nodes.append(
            helper.make_node("DequantizeLinear", inputs, [output], name=f"{output}_dequantize")
        )
        return output

    def _scale_and_zero(self, name: str) -> list[str]:
        if name not in self._parameters:
            affine = self._affine[name]
            self._parameters[name] = [
                self._graph.add_constant(f"{name}_scale", np.array(affine.scale, dtype=np.float32)),
                self._graph.add_constant(f"{name}_zero", np.array(affine.zero_point, dtype=np.uint8)),
            ]
        return self._parameters[name]


def _fused(unit: Unit) -> NodeProto | None:
    """The layer and its activation as one operator of ONNX Runtime's own; a Gemm must have a ReLU."""
    upper = unit.limits.upper if unit.limits is not None else None
    plain_relu = unit.limits is not None and upper is None
    if unit.operator not in FUSED or (unit.operator == "Gemm" and not plain_relu):
        return None
    node = helper.make_node(
        FUSED[unit.operator], list(unit.node.input), [unit.output], name=unit.node.name, domain=MS_DOMAIN
    )
    node.attribute.extend(unit.node.attribute)
    if plain_relu:
        set_attribute(node, "activation", "Relu")
    elif upper is not None:
        set_attribute(node, "activation", "Clip")
        set_attribute(node, "activation_params", [0.0, upper])
    return node


def _activation(unit: Unit) -> list[NodeProto]:
    return [] if unit.activation is None else [unit.activation]


def _islands(units: list[Unit], integer: list[bool], costs: list[Costs]) -> tuple[Island, ...]:
    return tuple(
        Island(unit.name, unit.operator, unit.macs, cost.reason or "between float neighbours")
        for unit, flag, cost in zip(units, integer, costs, strict=True)
        if not flag and unit.operator in COMPUTE
    )


def _integer_ratio(units: list[Unit], integer: list[bool]) -> float:
    total = sum(unit.macs for unit in units)
    done = sum(unit.macs for unit, flag in zip(units, integer, strict=True) if flag)
    return done / total if total else 0.0
