"""ONNX that carries its precision as every TensorRT from 8.0 to 11 takes it.

TensorRT reads int8 from explicit Q/DQ: symmetric, one scale for an activation, one a channel for a weight, biases in
float. Its older parsers refuse int8 constants ("invalid weights type of Int8" in 8.0 and 8.2), so weights stand in
float before their own Q/DQ, and TensorRT folds them while it builds. A residual add joins the convolution before it
in int8 only when the skip is int8 too, so the skip gets Q/DQ: those of another reader where there are any, else its
own, with the range that the calibration data show.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from onnx import NodeProto, helper

from jetway.configs.schema import Precision, TensorRtConfig
from jetway.tasks.contract import BF16_OPSET, FP16_SCALES_OPSET
from jetway.tasks.errors import ConfigError, ExportError
from jetway.tasks.lowering.float_types import (
    FloatTypes,
    at_opset,
    convert_float_types,
    float_tensors,
    soften_masks,
)
from jetway.tasks.lowering.ranges import observe_ranges
from jetway.tasks.lowering.units import COMPUTE
from jetway.tasks.onnx_graph import INT8_MAX, Array, Graph, attribute, dequantize, quantized_weight

Feeds = Iterable[dict[str, Array]]


@dataclass(frozen=True)
class LoweredForTensorRt:
    """The graph, what its conversion to fp16 or bf16 did, and the residual adds that run in int8."""

    graph: Graph
    types: FloatTypes
    quantized_residuals: tuple[str, ...] = ()
    released: tuple[str, ...] = ()


def lower_for_tensorrt(
    graph: Graph, precision: Precision, config: TensorRtConfig, feeds: Feeds, *, threads: int = 1
) -> LoweredForTensorRt:
    """Lowers an exported graph, which is used up. ``feeds`` are calibration inputs by name.

    Raises ConfigError for a ``mixed`` pattern that matches no node, ExportError for Q/DQ of unknown form.
    """
    chosen = _Precisions(config.mixed, _rest(graph, precision, config))
    check_patterns(config.mixed, [node.name for node in graph.nodes])
    feeds = list(feeds)
    released: tuple[str, ...] = ()
    residuals: tuple[str, ...] = ()
    if precision.has_quantizers:
        check_quantizers(graph)
        released = tuple(release_layers(graph, chosen))
        if config.quantize_residuals:
            residuals = tuple(quantize_residuals(graph, feeds, threads=threads))
        expand_weights(graph)
    graph, types = convert(graph, chosen, feeds, threads=threads)
    return LoweredForTensorRt(graph, types, residuals, released)


def convert(
    graph: Graph, precisions: _Precisions, feeds: Feeds, *, threads: int = 1
) -> tuple[Graph, FloatTypes]:
    """Gives every node its float type; a graph that stays in float32 is left as it is."""
    wanted = {precisions.of(node) for node in graph.nodes}
    if "bf16" in wanted:
        graph = at_opset(graph, BF16_OPSET)
    if wanted <= {"fp32"}:
        return graph, FloatTypes()
    if "fp16" not in wanted:
        return graph, convert_float_types(graph, precisions.of)
    softened = soften_masks(graph)
    ranges = observe_ranges(graph, float_tensors(graph), feeds, threads=threads)
    types = convert_float_types(graph, precisions.of, ranges)
    types.clipped.update(softened)
    return graph, types


def convert_all(
    graph: Graph, precision: Precision, feeds: Feeds, *, threads: int = 1
) -> tuple[Graph, FloatTypes]:
    """The whole graph in one float type."""
    return convert(graph, _Precisions({}, str(precision)), feeds, threads=threads)


class _Precisions:
    """The precision that the recipe wants for a node: that of the last pattern that matches its name."""

    def __init__(self, patterns: Mapping[str, str], default: str) -> None:
        self._patterns = patterns
        self._default = default

    def of(self, node: NodeProto) -> str:
        return self.named(node) or self._default

    def named(self, node: NodeProto) -> str | None:
        """The precision of a pattern that matches; None without one."""
        found = [value for pattern, value in self._patterns.items() if fnmatchcase(node.name, pattern)]
        return found[-1] if found else None


def check_patterns(patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raises ConfigError for a pattern of ``tensorrt.mixed`` that matches no node."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ConfigError(
                f"tensorrt.mixed: no node of the ONNX model matches {pattern!r}. Nearest: {', '.join(near)}."
            )


def _rest(graph: Graph, precision: Precision, config: TensorRtConfig) -> str:
    """The float type of what no pattern names. Older Q/DQ hold float32 alone: there a flag of TensorRT up to 8
    makes the rest fp16."""
    if not precision.has_quantizers:
        return str(precision)
    return config.int8_rest if graph.opsets[""] >= FP16_SCALES_OPSET else "fp32"


def check_quantizers(graph: Graph) -> None:
    """Raises ExportError for Q/DQ that some TensorRT refuses."""
    for node in graph.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = (
            graph.constants.get(name) for name in list(node.input[1:3]) + [""] * (3 - len(node.input))
        )
        is_weight = node.input[0] in graph.constants
        if scale is None or zero is None or zero.dtype != np.int8 or zero.any():
            raise _unknown(node, "its scale and zero point must be constants, the zero point int8 and 0")
        if scale.size != zero.size or not (scale > 0).all():
            raise _unknown(node, "its scales must be positive, with a zero point each")
        if scale.size > 1 and node.op_type == "QuantizeLinear" and not is_weight:
            raise _unknown(node, "an activation has one scale")


def _unknown(node: NodeProto, what: str) -> ExportError:
    return ExportError(
        f"{node.name or node.output[0]} ({node.op_type}) is in no form that TensorRT takes: {what}. Export with "
        "Jetway's own quantizers, or report the network's layer."
    )


def release_layers(graph: Graph, precisions: _Precisions) -> Iterator[str]:
    """Takes the layers that patterns name out of int8, and gives their names."""
    producers = graph.producers()
    for node in graph.nodes:
        if node.op_type not in COMPUTE or precisions.named(node) is None:
            continue
        for index, name in enumerate(node.input):
            weight = quantized_weight(graph, name)
            maker = producers.get(name)
            if weight is not None:
                node.input[index] = graph.add_constant(f"{weight.input[0]}_float", dequantize(graph, weight))
            elif maker is not None and maker.op_type == "DequantizeLinear":
                node.input[index] = producers[maker.input[0]].input[0]
        yield node.name


def quantize_residuals(graph: Graph, feeds: Feeds, *, threads: int = 1) -> Iterator[str]:
    """Lets each add after a quantized convolution read its other operand through Q/DQ; gives the adds' names."""
    adds = [(node, skip) for node in graph.nodes if (skip := _skip_of(graph, node)) is not None]
    quantized = _quantized_tensors(graph)
    missing = list(dict.fromkeys(skip for _, skip in adds if skip not in quantized))
    ranges = observe_ranges(graph, missing, feeds, threads=threads)
    for name in missing:
        magnitude = max(abs(bound) for bound in ranges[name])
        if 0 < magnitude < np.inf:
            quantized[name] = _insert_quantizer(graph, name, magnitude)
    for node, skip in adds:
        if skip in quantized:
            node.input[list(node.input).index(skip)] = quantized[skip]
            yield node.name


def _skip_of(graph: Graph, node: NodeProto) -> str | None:
    """The operand of an add that is not the output of the quantized layer before it."""
    if node.op_type != "Add" or any(name in graph.constants for name in node.input):
        return None
    producers, consumers = graph.producers(), graph.consumers()
    for main, skip in (node.input, reversed(node.input)):
        layer = producers.get(main)
        joins = layer is not None and layer.op_type in COMPUTE and len(consumers[main]) == 1
        if (
            joins
            and layer is not None
            and quantized_weight(graph, layer.input[1]) is not None
            and main != skip
        ):
            return str(skip)
    return None


def _quantized_tensors(graph: Graph) -> dict[str, str]:
    """The dequantized form of each tensor that has one."""
    consumers = graph.consumers()
    return {
        node.input[0]: consumers[node.output[0]][0].output[0]
        for node in graph.nodes
        if node.op_type == "QuantizeLinear" and node.output[0] in consumers
    }


def _insert_quantizer(graph: Graph, name: str, magnitude: float) -> str:
    """Q/DQ behind the tensor; returns the name of what comes out."""
    scale = graph.add_constant(f"{name}_skip_scale", np.array(magnitude / INT8_MAX, np.float32))
    zero = graph.add_constant(f"{name}_skip_zero", np.array(0, np.int8))
    quantized, output = f"{name}_skip_quantized", f"{name}_skip"
    pair = [
        helper.make_node("QuantizeLinear", [name, scale, zero], [quantized], name=quantized),
        helper.make_node(
            "DequantizeLinear", [quantized, scale, zero], [output], name=f"{name}_skip_dequantized"
        ),
    ]
    made = [index for index, node in enumerate(graph.nodes) if name in node.output]
    place = made[0] + 1 if made else 0
    graph.nodes[place:place] = pair
    return output


def expand_weights(graph: Graph) -> None:
    """Puts float constants and a QuantizeLinear where int8 constants are; the integers come out the same."""
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in graph.constants:
            stored, scale, zero = node.input
            weight = graph.add_constant(f"{stored}_float", dequantize(graph, node))
            quantized = f"{weight}_quantized"
            axis = {} if graph.constants[scale].ndim == 0 else {"axis": attribute(node, "axis", 1)}
            nodes.append(
                helper.make_node("QuantizeLinear", [weight, scale, zero], [quantized], name=quantized, **axis)
            )
            node.input[0] = quantized
        nodes.append(node)
    graph.nodes = nodes
