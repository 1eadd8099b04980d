"""The pass that turns TensorRT's Q/DQ into ONNX Runtime's, alone, on graphs made by hand."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper

from jetway.tasks.errors import ExportError
from jetway.tasks.lowering.for_onnxruntime import Lowered, lower_for_onnxruntime
from jetway.tasks.lowering.placement import Costs, choose_integer, unit_costs
from jetway.tasks.lowering.ranges import Affine, between, non_negative, observe_ranges, symmetric
from jetway.tasks.lowering.units import Unit, find_units, to_float_form
from jetway.tasks.onnx_graph import Graph, count_macs

Array = np.ndarray[Any, Any]


class QdqBuilder:
    """Builds a graph as the export leaves it: Q/DQ on the input and the weight of every layer."""

    def __init__(self, channels: int, size: int, *, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.shape = [1, channels, size, size]
        self._count = 0

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        self._count += 1
        output = f"t{self._count}"
        node = helper.make_node(
            operator, list(inputs), [output], name=f"{operator}{self._count}", **attributes
        )
        self.nodes.append(node)
        return output

    def constant(self, value: Array) -> str:
        self._count += 1
        self.constants[f"k{self._count}"] = value
        return f"k{self._count}"

    def quantize(self, tensor: str, magnitude: float, *, zero: int = 0) -> str:
        scale = self.constant(np.array(magnitude / 127, np.float32))
        zero_point = self.constant(np.array(zero, np.int8))
        quantized = self.add("QuantizeLinear", tensor, scale, zero_point)
        return self.add("DequantizeLinear", quantized, scale, zero_point)

    def weight(self, *shape: int, quantized: bool = True) -> str:
        fan_in = int(np.prod(shape[1:]))
        value = self.rng.standard_normal(shape).astype(np.float32) * np.float32(np.sqrt(2 / fan_in))
        if not quantized:
            return self.constant(value)
        scales = np.abs(value).reshape(shape[0], -1).max(1) / np.float32(127)
        integers = np.rint(value / scales.reshape(-1, *[1] * (len(shape) - 1))).astype(np.int8)
        names = [self.constant(integers), self.constant(scales), self.constant(np.zeros(shape[0], np.int8))]
        return self.add("DequantizeLinear", *names, axis=0)

    def convolution(
        self, source: str, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1,
        magnitude: float | None = 4.0,
    ) -> str:  # fmt: skip
        """``magnitude`` None leaves the layer without quantizers."""
        quantized = magnitude is not None
        source = self.quantize(source, magnitude) if magnitude is not None else source
        weight = self.weight(outputs, inputs // groups, kernel, kernel, quantized=quantized)
        bias = self.constant(self.rng.standard_normal(outputs).astype(np.float32) * np.float32(0.1))
        return self.add(
            "Conv", source, weight, bias, group=groups, kernel_shape=[kernel] * 2,
            strides=[stride] * 2, pads=[kernel // 2] * 4,
        )  # fmt: skip

    def linear(self, source: str, inputs: int, outputs: int, *, biased: bool) -> str:
        """A layer over the last axis, as PyTorch's exporter writes it."""
        value = self.rng.standard_normal((inputs, outputs)).astype(np.float32) * np.float32(inputs**-0.5)
        scales = np.abs(value).max(0) / np.float32(127)
        names = [self.constant(np.rint(value / scales).astype(np.int8)), self.constant(scales)]
        zeros = self.constant(np.zeros(outputs, np.int8))
        weight = self.add("DequantizeLinear", *names, zeros, axis=1)
        product = self.add("MatMul", self.quantize(source, 4.0), weight)
        if not biased:
            return product
        bias = self.constant(self.rng.standard_normal(outputs).astype(np.float32))
        return self.add("Add", bias, product)

    def relu(self, source: str) -> str:
        return self.add("Relu", source)

    def residual(self, source: str, channels: int) -> str:
        inner = self.relu(self.convolution(source, channels, channels))
        return self.relu(self.add("Add", source, self.convolution(inner, channels, channels)))

    def classifier(self, source: str, channels: int, classes: int = 10) -> str:
        pooled = self.add("Flatten", self.add("GlobalAveragePool", source), axis=1)
        weight = self.weight(classes, channels)
        bias = self.constant(np.zeros(classes, np.float32))
        return self.add("Gemm", self.quantize(pooled, 4.0), weight, bias, transB=1)

    def graph(self, *outputs: str) -> Graph:
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        return Graph(self.nodes, self.constants, [value], results, {"": 17}, ir_version=8)


def reference_like() -> Graph:
    """The shape of the digits network after pruning: float stem, depthwise, dense residual blocks."""
    b = QdqBuilder(1, 32)
    t = b.relu(b.convolution("x", 1, 32, stride=2))
    t = b.relu(b.convolution(t, 32, 32, stride=2, groups=32))
    t = b.residual(b.relu(b.convolution(t, 32, 64, kernel=1)), 64)
    t = b.relu(b.convolution(t, 64, 64, stride=2, groups=64))
    t = b.residual(b.relu(b.convolution(t, 64, 128, kernel=1)), 128)
    return b.graph(b.classifier(t, 128))


def feeds(graph: Graph, count: int, *, seed: int = 1) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    shape = [dim.dim_value for dim in graph.inputs[0].type.tensor_type.shape.dim]
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def lower(graph: Graph) -> Lowered:
    return lower_for_onnxruntime(deepcopy(graph), feeds(graph, 32))


def session(graph: Graph, *, optimize: bool, saved_as: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    if saved_as:
        options.optimized_model_filepath = str(saved_as)
    model = graph.to_model().SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def outputs(graph: Graph, inputs: list[dict[str, Array]], *, optimize: bool) -> Array:
    runner = session(graph, optimize=optimize)
    return np.stack([runner.run(None, feed)[0] for feed in inputs])


def relative_error(graph: Graph, lowered: Graph) -> float:
    """Largest difference between what the Q/DQ mean and what the optimized lowered graph gives."""
    inputs = feeds(graph, 32, seed=2)
    meant, given = outputs(graph, inputs, optimize=False), outputs(lowered, inputs, optimize=True)
    return float(np.abs(given - meant).max() / np.abs(meant).max())


def optimized_operators(graph: Graph, folder: Path) -> Counter[str]:
    session(graph, optimize=True, saved_as=folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_lower_puts_the_macs_of_the_reference_shape_into_integer_kernels(tmp_path: Path) -> None:
    graph = reference_like()
    lowered = lower(graph)
    operators = optimized_operators(lowered.graph, tmp_path)
    convolutions = sum(node.op_type == "Conv" for node in graph.nodes)
    assert lowered.integer_macs_ratio >= 0.90
    assert operators["QLinearConv"] == convolutions - len(lowered.islands)
    assert operators["QLinearAdd"] == 2
    assert operators["QGemm"] == 1
    assert operators["Relu"] == 0
    assert lowered.islands[0].macs == 16 * 16 * 32 * 9


def test_lower_agrees_with_the_meaning_of_the_qdq() -> None:
    graph = reference_like()
    lowered = lower(graph).graph
    inputs = feeds(graph, 64, seed=3)
    meant, given = outputs(graph, inputs, optimize=False), outputs(lowered, inputs, optimize=True)
    assert np.abs(given - meant).max() <= 0.10 * np.abs(meant).max()
    assert np.mean(meant.argmax(-1) == given.argmax(-1)) >= 0.95


def test_lower_gives_the_same_bytes_again() -> None:
    first, second = (lower(reference_like()).graph.to_model() for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(first))


@pytest.mark.serial
@pytest.mark.skipif(
    "avx512_vnni" not in Path("/proc/cpuinfo").read_text(), reason="integers are fast where the CPU has VNNI"
)
def test_lower_is_faster_than_float_and_than_tensorrt_qdq() -> None:
    graph = reference_like()
    given = deepcopy(graph)
    floating = to_float_form(deepcopy(graph)).graph
    sessions = {
        name: session(g, optimize=True)
        for name, g in {"lowered": lower(graph).graph, "given": given, "float": floating}.items()
    }
    medians = median_seconds(sessions, feeds(graph, 1)[0])
    assert medians["lowered"] <= 0.65 * medians["float"]
    assert medians["lowered"] <= 0.65 * medians["given"]


def median_seconds(sessions: dict[str, Any], feed: dict[str, Array]) -> dict[str, float]:
    """Interleaved slices: what else the machine does meets all sessions alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(20):
        for name, runner in sessions.items():
            for _ in range(30):
                started = time.perf_counter()
                runner.run(None, feed)
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def relu6(b: QdqBuilder, source: str) -> str:
    limits = [b.constant(np.array(value, np.float32)) for value in (0.0, 6.0)]
    return b.add("Clip", source, *limits)


def concatenated(b: QdqBuilder) -> str:
    stem = b.relu(b.convolution("x", 3, 32))
    left = b.relu(b.convolution(b.add("MaxPool", stem, kernel_shape=[2, 2], strides=[2, 2]), 32, 64))
    right = b.convolution(stem, 32, 64, stride=2)
    return b.classifier(b.add("Concat", left, right, axis=1), 128)


def with_swish(b: QdqBuilder) -> str:
    t = b.relu(b.convolution("x", 3, 32))
    t = b.convolution(t, 32, 64)
    t = b.add("Mul", t, b.add("Sigmoid", t))
    return b.classifier(b.convolution(t, 64, 64), 64)


def mobile(b: QdqBuilder) -> str:
    t = relu6(b, b.convolution("x", 3, 32, stride=2))
    t = relu6(b, b.convolution(t, 32, 72))
    t = relu6(b, b.convolution(t, 72, 72, groups=72))
    t = relu6(b, b.convolution(t, 72, 24, kernel=1))
    return b.classifier(b.convolution(t, 24, 96), 96)


def convolution_output(b: QdqBuilder) -> str:
    return b.convolution(b.relu(b.convolution("x", 3, 64)), 64, 64)


def unknown_operator(b: QdqBuilder) -> str:
    t = b.relu(b.convolution("x", 3, 64))
    return b.classifier(b.convolution(b.add("Tanh", b.convolution(t, 64, 64)), 64, 64), 64)


def negative_clip(b: QdqBuilder) -> str:
    limits = [b.constant(np.array(value, np.float32)) for value in (-1.0, 1.0)]
    t = b.add("Clip", b.convolution(b.relu(b.convolution("x", 3, 64)), 64, 64), *limits)
    return b.classifier(b.convolution(t, 64, 64), 64)


def reshaped_by_its_own_shape(b: QdqBuilder) -> str:
    """Sizes are joined by Concat, as activations are, but are whole numbers."""
    t = b.relu(b.convolution(b.relu(b.convolution("x", 3, 64)), 64, 64))
    size = b.add("Slice", b.add("Shape", t), *(b.constant(np.array([i], np.int64)) for i in (0, 2)))
    same = b.add("Concat", size, b.constant(np.array([32, 32], np.int64)), axis=0)
    return b.classifier(b.convolution(b.add("Reshape", t, same), 64, 64), 64)


FAMILIES = [
    reshaped_by_its_own_shape, concatenated, with_swish, mobile, convolution_output, unknown_operator, negative_clip,
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_lower_keeps_the_outputs_of_other_networks(family: Any) -> None:
    b = QdqBuilder(3, 32)
    graph = b.graph(family(b))
    lowered = lower(graph)
    assert lowered.integer_macs_ratio > 0.3
    assert relative_error(graph, lowered.graph) <= 0.10


def test_lower_cuts_off_before_a_movement_what_the_quantizer_behind_it_cuts_off() -> None:
    """QAT may leave activations that are larger than the range they were calibrated to."""
    b = QdqBuilder(64, 16)
    t = b.relu(b.convolution("x", 64, 64))
    pooled = b.add("MaxPool", t, kernel_shape=[2, 2], strides=[2, 2])
    graph = b.graph(b.convolution(pooled, 64, 64, magnitude=0.5))
    assert relative_error(graph, lower(graph).graph) <= 0.10


def test_lower_keeps_the_steps_that_a_network_was_trained_with() -> None:
    """Many activations here are less than half a step, which the quantizer makes 0."""
    b = QdqBuilder(64, 16)
    t = b.relu(b.convolution("x", 64, 64))
    graph = b.graph(b.convolution(t, 64, 64, magnitude=120.0))
    inputs = feeds(graph, 8, seed=2)
    meant = outputs(graph, inputs, optimize=False)
    forms = [
        lower_for_onnxruntime(deepcopy(graph), feeds(graph, 32), trained=trained) for trained in (True, False)
    ]
    kept, finer = (np.square(outputs(form.graph, inputs, optimize=True) - meant).mean() for form in forms)
    assert kept < 0.1 * finer


def test_lower_cuts_off_what_the_quantizers_of_a_trained_network_cut_off() -> None:
    b = QdqBuilder(64, 16)
    t = b.relu(b.convolution("x", 64, 64))
    graph = b.graph(b.convolution(t, 64, 64, magnitude=1.0))
    trained = lower_for_onnxruntime(deepcopy(graph), feeds(graph, 32), trained=True)
    assert relative_error(graph, trained.graph) <= 0.05


def test_layers_in_float_cut_off_too_what_a_network_was_trained_without() -> None:
    b = QdqBuilder(4, 8)
    t = b.relu(b.convolution("x", 4, 4))
    graph = b.graph(b.convolution(b.relu(b.convolution(t, 4, 4, magnitude=0.3)), 4, 4, magnitude=4.0))
    lowered = lower_for_onnxruntime(deepcopy(graph), feeds(graph, 32), trained=True)
    assert len(lowered.islands) == 3
    assert relative_error(graph, lowered.graph) <= 0.15
    assert relative_error(graph, lower(graph).graph) > 0.5


@pytest.mark.parametrize("biased", [True, False])
def test_lower_computes_linear_layers_of_tokens_in_integers(biased: bool, tmp_path: Path) -> None:
    b = QdqBuilder(96, 12)
    tokens = b.add("Transpose", "x", perm=[0, 2, 3, 1])
    hidden = b.relu(b.linear(tokens, 96, 192, biased=biased))
    graph = b.graph(b.linear(hidden, 192, 96, biased=biased))
    lowered = lower(graph)
    operators = optimized_operators(lowered.graph, tmp_path)
    assert lowered.integer_macs_ratio == 1.0
    assert operators["MatMulIntegerToFloat"] + operators["QLinearMatMul"] == 2
    assert operators["MatMul"] + operators["Gemm"] + operators["Add"] == 0
    assert relative_error(graph, lowered.graph) <= 0.05


def test_lower_adds_a_bias_once_where_the_product_is_read_too() -> None:
    b = QdqBuilder(96, 12)
    tokens = b.add("Transpose", "x", perm=[0, 2, 3, 1])
    biased = b.linear(tokens, 96, 192, biased=True)
    product = next(node for node in b.nodes if node.op_type == "MatMul").output[0]
    graph = b.graph(b.add("Sub", biased, b.add("Sigmoid", product)))
    assert relative_error(graph, lower(graph).graph) <= 0.05


def test_lower_keeps_every_output_of_the_graph() -> None:
    b = QdqBuilder(3, 16)
    inner = b.relu(b.convolution("x", 3, 64))
    graph = b.graph(b.convolution(inner, 64, 64), inner)
    lowered = lower(graph).graph
    assert lowered.output_names == graph.output_names
    assert relative_error(graph, lowered) <= 0.10


def pooled_between_layers(**attributes: Any) -> Graph:
    b = QdqBuilder(32, 16)
    t = b.relu(b.convolution("x", 32, 32))
    t = b.add("AveragePool", t, kernel_shape=[3, 3], pads=[1] * 4, **attributes)
    return b.graph(b.relu(b.convolution(t, 32, 32)))


def test_lower_averages_by_a_convolution(tmp_path: Path) -> None:
    graph = pooled_between_layers(count_include_pad=1)
    lowered = lower(graph).graph
    assert optimized_operators(lowered, tmp_path)["QLinearConv"] == 3
    assert relative_error(graph, lowered) < 0.03


def test_lower_keeps_an_average_whose_edges_count_fewer_taps(tmp_path: Path) -> None:
    graph = pooled_between_layers()
    lowered = lower(graph).graph
    assert optimized_operators(lowered, tmp_path)["QLinearConv"] == 2
    assert relative_error(graph, lowered) < 0.03


def test_lower_leaves_a_layer_without_quantizers_in_exact_float(tmp_path: Path) -> None:
    """ONNX Runtime quantizes a float Conv between Q/DQ by itself, one scale a tensor, if it is let."""
    b = QdqBuilder(3, 16)
    t = b.relu(b.convolution("x", 3, 64))
    kept = b.relu(b.convolution(t, 64, 64, magnitude=None))
    graph = b.graph(b.classifier(b.relu(b.convolution(kept, 64, 128)), 128))
    lowered = lower(graph)
    reasons = {island.name: island.reason for island in lowered.islands}
    assert [reason for reason in reasons.values() if "no quantizers" in reason]
    operators = optimized_operators(lowered.graph, tmp_path)
    assert operators["QLinearConv"] == 3 - len(reasons)
    assert relative_error(graph, lowered.graph) <= 0.10


def test_lower_keeps_a_bias_without_weights() -> None:
    """A pruned-away channel has weights of 0, so its scale says nothing of its bias."""
    b = QdqBuilder(3, 16)
    t = b.relu(b.convolution("x", 3, 64))
    graph = b.graph(b.classifier(b.relu(b.convolution(t, 64, 64)), 64))
    second = [node for node in graph.nodes if node.op_type == "Conv"][1]
    dequantize = graph.producers()[second.input[1]]
    graph.constants[dequantize.input[0]][5] = 0
    graph.constants[dequantize.input[1]][5] = 1e-12
    graph.constants[second.input[2]][5] = 3.0
    assert relative_error(graph, lower(graph).graph) <= 0.10


def test_lower_refuses_asymmetric_quantizers() -> None:
    b = QdqBuilder(3, 8)
    graph = b.graph(b.relu(b.quantize("x", 1.0, zero=3)))
    with pytest.raises(ExportError, match="zero point 0"):
        lower(graph)


def test_to_float_form_reads_ranges_and_layers() -> None:
    b = QdqBuilder(3, 8)
    first = b.convolution("x", 3, 16, magnitude=2.5)
    second = b.convolution(first, 16, 16, magnitude=None)
    form = to_float_form(b.graph(second))
    assert form.ranges == {"x": pytest.approx(2.5)}
    assert form.quantized == {first}
    assert [node.op_type for node in form.graph.nodes] == ["DequantizeLinear", "Conv", "Conv"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "groups", "size", "integer"),
    [
        (64, 64, 3, 1, 8, True),
        (128, 128, 1, 1, 8, True),
        (1, 32, 3, 1, 32, False),
        (3, 32, 3, 1, 32, False),
        (72, 72, 3, 72, 8, False),
        (24, 24, 3, 24, 16, False),
    ],
)
def test_unit_costs_order_kernels_as_measured(
    inputs: int, outputs: int, kernel: int, groups: int, size: int, integer: bool
) -> None:
    b = QdqBuilder(inputs, size)
    graph = b.graph(b.convolution("x", inputs, outputs, kernel=kernel, groups=groups))
    form = to_float_form(graph)
    weight = form.graph.nodes[0]
    shapes = form.graph.shapes() | {weight.output[0]: (outputs, inputs // groups, kernel, kernel)}
    unit = find_units(form.graph, shapes)[0]
    costs = unit_costs(unit, shapes, quantized=True)
    assert costs.integer is not None
    assert (costs.integer < costs.floating) is integer


def crossings(graph: Graph, units: list[Unit], integer: tuple[bool, ...]) -> float:
    """Cost of the conversions of an assignment: 1.0 us a tensor of these graphs and direction."""
    made = {unit.output: flag for unit, flag in zip(units, integer, strict=True)}
    total = 0.0
    for name in {*graph.input_names, *made}:
        read = [flag for unit, flag in zip(units, integer, strict=True) if name in unit.inputs]
        read += [False] * (name in graph.output_names)
        if made.get(name, False):
            total += 1.0 * (False in read)
        else:
            total += 1.0 * (True in read)
    return total


def random_dag(rng: np.random.Generator) -> tuple[Graph, list[Unit]]:
    names, nodes = ["x"], []
    for index in range(int(rng.integers(2, 8))):
        chosen = rng.choice(names, size=min(len(names), int(rng.integers(1, 3))), replace=False)
        nodes.append(helper.make_node("Op", list(map(str, chosen)), [f"n{index}"]))
        names.append(f"n{index}")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, [1])
    graph = Graph(nodes, {}, [value], [result], {"": 17}, ir_version=8)
    return graph, [Unit(node, None, None, tuple(node.input), 0) for node in nodes]


@pytest.mark.parametrize("seed", range(25))
def test_choose_integer_finds_the_cheapest_assignment(seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph, units = random_dag(rng)
    costs = [
        Costs(float(rng.integers(1, 8)), None if rng.random() < 0.2 else float(rng.integers(0, 6)))
        for _ in units
    ]

    def total(integer: tuple[bool, ...]) -> float:
        own = sum(
            (cost.integer if flag else cost.floating) if cost.integer is not None or not flag else np.inf
            for cost, flag in zip(costs, integer, strict=True)
        )
        return float(own) + crossings(graph, units, integer)

    best = min(total(choice) for choice in itertools.product([False, True], repeat=len(units)))
    # an unknown shape counts as one element
    chosen = tuple(choose_integer(graph, units, {}, costs))
    assert total(chosen) == pytest.approx(best, abs=0.1)


@pytest.mark.parametrize(
    ("affine", "value"),
    [(symmetric(2.0), -2.0), (symmetric(2.0), 1.3), (non_negative(3.0), 3.0), (between(-1.0, 2.0), -1.0)],
)
def test_affine_represents_its_range(affine: Affine, value: float) -> None:
    integer = np.clip(round(value / affine.scale) + affine.zero_point, 0, 255)
    assert (integer - affine.zero_point) * affine.scale == pytest.approx(value, abs=affine.scale)


def test_affine_of_a_tensor_that_is_always_zero_is_usable() -> None:
    for affine in (symmetric(0.0), non_negative(0.0), between(0.0, 0.0)):
        assert affine.scale > 0
        assert 0 <= affine.zero_point <= 255


def test_observe_ranges_sees_inner_tensors() -> None:
    b = QdqBuilder(2, 1)
    doubled = b.add("Add", "x", "x")
    graph = b.graph(b.relu(doubled))

    def inputs() -> Iterator[dict[str, Array]]:
        for value in (-3.0, 5.0):
            yield {"x": np.full((1, 2, 1, 1), value, np.float32)}

    assert observe_ranges(graph, [doubled], inputs()) == {doubled: (-6.0, 10.0)}
    assert graph.output_names != [doubled]


def test_integer_macs_ratio_counts_macs() -> None:
    graph = reference_like()
    form = to_float_form(deepcopy(graph))
    weights = {
        node.output[0]: tuple(form.graph.constants[node.input[0]].shape)
        for node in form.graph.nodes
        if node.op_type == "DequantizeLinear"
    }
    shapes = form.graph.shapes() | weights
    total = sum(count_macs(node, shapes) for node in form.graph.nodes)
    lowered = lower(graph)
    left = sum(island.macs for island in lowered.islands)
    assert lowered.integer_macs_ratio == pytest.approx(1 - left / total)
