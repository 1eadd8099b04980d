"""Rewrites of ONNX graphs keep what the graph computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper

from jetway.tasks.onnx_graph import (
    Graph,
    count_macs,
    dequantize,
    fold_batchnorms,
    fold_constants,
    node_inputs,
    quantized_weight,
)

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)


def make_graph(
    nodes: list[NodeProto], constants: dict[str, Array], inputs: dict[str, list[Any]], outputs: list[str]
) -> Graph:
    return Graph(
        nodes=nodes,
        constants=constants,
        inputs=[helper.make_tensor_value_info(name, TensorProto.FLOAT, s) for name, s in inputs.items()],
        outputs=[helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        opsets={"": 17},
        ir_version=8,
    )


def run(graph: Graph, **inputs: Array) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    model = graph.to_model()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs: list[Array] = session.run(None, inputs)
    return outputs


def randn(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def batchnorm_constants(channels: int, gamma: Array | None = None) -> dict[str, Array]:
    return {
        "gamma": randn(channels) if gamma is None else gamma,
        "beta": randn(channels),
        "mean": randn(channels),
        "variance": np.abs(randn(channels)) + np.float32(0.1),
    }


def batchnorm(source: str, output: str = "y") -> NodeProto:
    return helper.make_node(
        "BatchNormalization", [source, "gamma", "beta", "mean", "variance"], [output], epsilon=1e-3
    )


LAYERS = {
    "convolution": (helper.make_node("Conv", ["x", "w"], ["c"]), (4, 3, 3, 3), (2, 3, 6, 6), 4),
    "with bias": (helper.make_node("Conv", ["x", "w", "b"], ["c"]), (4, 3, 3, 3), (2, 3, 6, 6), 4),
    "depthwise": (helper.make_node("Conv", ["x", "w"], ["c"], group=4), (4, 1, 3, 3), (2, 4, 6, 6), 4),
    "transposed": (helper.make_node("ConvTranspose", ["x", "w"], ["c"]), (3, 4, 2, 2), (2, 3, 5, 5), 4),
    "linear": (helper.make_node("Gemm", ["x", "w", "b"], ["c"], transB=1), (4, 3), (2, 3), 4),
    "linear, not transposed": (helper.make_node("Gemm", ["x", "w", "b"], ["c"]), (3, 4), (2, 3), 4),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_fold_batchnorms_keeps_the_outputs(kind: str) -> None:
    layer, weight_shape, input_shape, channels = LAYERS[kind]
    node = NodeProto()
    node.CopyFrom(layer)
    constants = {"w": randn(*weight_shape), "b": randn(channels)} | batchnorm_constants(channels)
    graph = make_graph([node, batchnorm("c")], constants, {"x": list(input_shape)}, ["y"])
    x = randn(*input_shape)
    before = run(graph, x=x)

    assert fold_batchnorms(graph) == 1

    assert [node.op_type for node in graph.nodes] == [layer.op_type]
    np.testing.assert_allclose(run(graph, x=x)[0], before[0], rtol=1e-4, atol=1e-5)


def quantized_convolution(gamma: Array) -> Graph:
    weight = RNG.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)
    constants = {
        "wq": weight,
        "ws": np.abs(randn(4)) * np.float32(0.01) + np.float32(0.001),
        "wz": np.zeros(4, np.int8),
    } | batchnorm_constants(4, gamma)
    nodes = [
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["w"], axis=0),
        helper.make_node("Conv", ["x", "w"], ["c"]),
        batchnorm("c"),
    ]
    return make_graph(nodes, constants, {"x": [1, 3, 5, 5]}, ["y"])


@pytest.mark.parametrize(
    "gamma", [[0.5, 1.0, 2.0, 3.0], [-0.5, 1.0, -2.0, 3.0], [0.0, 1.0, -1.0, 0.0]], ids=str
)
def test_fold_batchnorms_keeps_int8_weights(gamma: list[float]) -> None:
    graph = quantized_convolution(np.array(gamma, np.float32))
    x = randn(1, 3, 5, 5)
    before = run(graph, x=x)

    assert fold_batchnorms(graph) == 1

    np.testing.assert_allclose(run(graph, x=x)[0], before[0], rtol=1e-4, atol=1e-5)
    weight = quantized_weight(graph, graph.nodes[-1].input[1])
    assert weight is not None
    assert graph.constants[weight.input[0]].dtype == np.int8
    assert (graph.constants[weight.input[1]] > 0).all()


def test_fold_batchnorms_leaves_one_that_follows_no_layer() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["c"]), batchnorm("c")]
    graph = make_graph(nodes, batchnorm_constants(3), {"x": [1, 3, 2, 2]}, ["y"])
    assert fold_batchnorms(graph) == 0
    assert [node.op_type for node in graph.nodes] == ["Relu", "BatchNormalization"]


def test_fold_batchnorms_leaves_a_layer_that_others_read() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        batchnorm("c", "n"),
        helper.make_node("Add", ["c", "n"], ["y"]),
    ]
    constants = {"w": randn(3, 3, 1, 1)} | batchnorm_constants(3)
    assert fold_batchnorms(make_graph(nodes, constants, {"x": [1, 3, 2, 2]}, ["y"])) == 0


def test_fold_batchnorms_does_not_touch_a_shared_weight() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        batchnorm("c", "y"),
        helper.make_node("Conv", ["x", "w"], ["z"]),
    ]
    weight = randn(3, 3, 1, 1)
    graph = make_graph(nodes, {"w": weight} | batchnorm_constants(3), {"x": [1, 3, 2, 2]}, ["y", "z"])
    x = randn(1, 3, 2, 2)
    before = run(graph, x=x)
    fold_batchnorms(graph)
    for old, new in zip(before, run(graph, x=x), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-5)


def test_fold_constants_stores_quantized_weights_as_int8() -> None:
    constants = {"w": randn(4, 3), "s": np.full(4, 0.02, np.float32), "z32": np.zeros(4, np.float32)}
    nodes = [
        helper.make_node("Identity", ["z32"], ["same"]),
        helper.make_node("Cast", ["same"], ["z"], to=TensorProto.INT8),
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=0),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], axis=0),
        helper.make_node("Transpose", ["d"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    graph = make_graph(nodes, constants, {"x": [2, 3]}, ["y"])
    x = randn(2, 3)
    before = run(graph, x=x)

    fold_constants(graph)

    np.testing.assert_allclose(run(graph, x=x)[0], before[0], rtol=1e-6)
    assert [node.op_type for node in graph.nodes] == ["DequantizeLinear", "MatMul"]
    weight = quantized_weight(graph, "t")
    assert weight is not None
    assert graph.constants[weight.input[0]].dtype == np.int8
    assert dequantize(graph, weight).shape == (3, 4)
    assert "w" not in {tensor.name for tensor in graph.to_model().graph.initializer}


def test_fold_constants_drops_a_cast_to_the_same_type() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    graph = make_graph(nodes, {}, {"x": [2]}, ["y"])
    fold_constants(graph)
    assert [node.op_type for node in graph.nodes] == ["Relu"]


def test_to_model_drops_what_nothing_reads_and_keeps_what_a_subgraph_reads() -> None:
    inner = helper.make_graph(
        [helper.make_node("Add", ["kept", "x"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [2])],
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["kept"]),
        helper.make_node("Relu", ["x"], ["dead"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner),
    ]
    constants = {"flag": np.array(True), "unused": randn(3)}
    graph = make_graph(nodes, constants, {"x": [2]}, ["y"])
    assert set(node_inputs(nodes[2])) == {"flag", "kept", "x"}

    model = graph.to_model()

    assert [node.op_type for node in model.graph.node] == ["Relu", "If"]
    assert [tensor.name for tensor in model.graph.initializer] == ["flag"]
    np.testing.assert_allclose(run(graph, x=np.array([1.0, -1.0], np.float32))[0], [2.0, -1.0])


def test_to_model_writes_the_same_bytes() -> None:
    def build() -> bytes:
        node = helper.make_node("Conv", ["x", "w"], ["y"])
        graph = make_graph([node], {"w": np.ones((2, 2, 1, 1), np.float32)}, {"x": [1, 2, 3, 3]}, ["y"])
        return bytes(graph.to_model().SerializeToString(deterministic=True))

    assert build() == build()


def test_shapes_and_count_macs_take_an_open_batch_as_one() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], group=2, pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "v"], ["y"], transB=1),
    ]
    constants = {"w": randn(6, 2, 3, 3), "v": randn(5, 6)}
    graph = make_graph(nodes, constants, {"x": ["batch", 4, 8, 8]}, ["y"])
    shapes = graph.shapes()
    assert shapes["c"] == (1, 6, 8, 8)
    assert shapes["y"] == (1, 5)
    assert [count_macs(node, shapes) for node in graph.nodes] == [6 * 8 * 8 * 2 * 9, 0, 0, 30]
