"""Conversion of float graphs to fp16 and bf16: what is converted, what stays, and that nothing overflows unseen."""

import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from jetway.configs.schema import Precision
from jetway.tasks.lowering.float_types import (
    FP16_LEAST,
    FP16_MAX,
    at_opset,
    convert_float_types,
    emulate_bf16,
    float_tensors,
    soften_masks,
)
from jetway.tasks.lowering.for_tensorrt import convert_all
from jetway.tasks.onnx_graph import Graph, attribute

RNG = np.random.default_rng(0)
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def randn(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def make_graph(nodes, constants=None, inputs=None, outputs=("y",), opset=17, shape=None):
    return Graph(
        nodes=nodes,
        constants=constants or {},
        inputs=[
            helper.make_tensor_value_info(name, FLOAT, shape)
            for name, shape in (inputs or {"x": [1, 4, 8, 8]}).items()
        ],
        outputs=[helper.make_tensor_value_info(name, FLOAT, shape) for name in outputs],
        opsets={"": opset},
        ir_version=8,
    )


def node(operator, inputs, outputs, **attributes):
    return helper.make_node(operator, inputs, outputs, name=f"{operator}_{outputs[0]}", **attributes)


def convert(graph, ranges=None, precision="fp16", kept=()):
    return convert_float_types(graph, lambda n: "fp32" if n.op_type in kept else precision, ranges)


def run(graph, **feeds):
    model = graph.to_model()
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    ).run(None, feeds)


def types_of(graph):
    return graph.element_types()


CONVOLUTION = {"w": randn(4, 4, 3, 3) * np.float32(0.2), "b": randn(4)}


def convolution():
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("Add", ["r", "x"], ["y"]),
    ]
    return make_graph(nodes, dict(CONVOLUTION))


def test_inputs_and_outputs_stay_float32():
    graph = convolution()
    x = randn(1, 4, 8, 8)
    (expected,) = run(convolution(), x=x)
    assert convert(graph).kept == []
    assert [value.type.tensor_type.elem_type for value in (*graph.inputs, *graph.outputs)] == [FLOAT, FLOAT]
    types = types_of(graph)
    assert {types[name] for n in graph.nodes if n.op_type != "Cast" for name in n.output} == {HALF}
    (actual,) = run(graph, x=x)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=2e-2)


def test_an_input_is_cast_once_for_all_its_readers():
    graph = convolution()
    convert(graph)
    assert sum(n.op_type == "Cast" for n in graph.nodes) == 2
    assert graph.nodes[0].op_type == "Cast"


def test_an_output_that_is_read_inside_too_is_cast_at_the_end():
    nodes = [node("Relu", ["x"], ["y"]), node("Neg", ["y"], ["z"])]
    graph = make_graph(nodes, outputs=("y", "z"))
    convert(graph)
    x = randn(1, 4, 8, 8)
    y, z = run(graph, x=x)
    assert (y.dtype, z.dtype) == (np.float32, np.float32)
    np.testing.assert_array_equal(y, -z)


def test_a_kept_node_computes_in_float32_between_casts():
    graph = convolution()
    convert(graph, kept=("Conv",))
    producers = graph.producers()
    types = types_of(graph)
    convolved = next(n for n in graph.nodes if n.op_type == "Conv")
    assert convolved.input[0] == "x"
    assert graph.constants[convolved.input[1]].dtype == np.float32
    assert types[convolved.output[0]] == FLOAT
    relu = next(n for n in graph.nodes if n.op_type == "Relu")
    assert producers[relu.input[0]].op_type == "Cast"
    run(graph, x=randn(1, 4, 8, 8))


def test_a_constant_serves_both_precisions():
    nodes = [node("Add", ["x", "k"], ["a"]), node("Mul", ["a", "k"], ["y"])]
    graph = make_graph(nodes, {"k": randn(4, 1, 1)})
    convert(graph, kept=("Mul",))
    run(graph, x=randn(1, 4, 8, 8))
    used = [n.input[1] for n in graph.nodes if n.op_type in ("Add", "Mul")]
    assert [graph.constants[name].dtype for name in used] == [np.float16, np.float32]


def test_values_beyond_fp16_stay_in_float32_with_the_reason():
    nodes = [node("Mul", ["x", "k"], ["big"]), node("Mul", ["big", "s"], ["y"])]
    graph = make_graph(nodes, {"k": np.array(1e6, np.float32), "s": np.array(1e-6, np.float32)})
    kept = convert(graph, {"big": (-3e6, 2e6)}).kept
    assert [entry.name for entry in kept] == ["Mul_big", "Mul_y"]
    assert "big reaches 3e+06" in kept[0].reason
    x = randn(1, 4, 8, 8)
    np.testing.assert_allclose(run(graph, x=x)[0], x, rtol=1e-5)


def test_calibration_finds_the_values_beyond_fp16():
    nodes = [node("Mul", ["x", "k"], ["big"]), node("Mul", ["big", "s"], ["y"])]
    constants = {"k": np.array(6e4, np.float32), "s": np.array(1 / 6e4, np.float32)}
    x = np.full((1, 4, 8, 8), 2.0, np.float32)
    graph, report = convert_all(make_graph(nodes, constants), Precision.FP16, [{"x": x}])
    assert [entry.name for entry in report.kept] == ["Mul_big", "Mul_y"]
    assert np.isfinite(run(graph, x=x)[0]).all()


def test_a_constant_beyond_fp16_is_clipped_and_listed():
    graph = make_graph([node("Add", ["x", "mask"], ["y"])], {"mask": np.array(-1e9, np.float32)})
    report = convert(graph)
    assert report.clipped == {"mask": pytest.approx(1e9)}
    assert report.to_json()["clipped_constants"] == report.clipped
    assert np.isfinite(run(graph, x=np.zeros((1, 4, 8, 8), np.float32))[0]).all()


def test_only_what_is_a_mask_is_softened():
    constants = {
        "mask": np.array([0, -1e9], np.float32),
        "lowest": np.array(np.finfo(np.float32).min),
        "infinite": np.array([0, -np.inf], np.float32),
        "weights": np.array([0.5, -1e9], np.float32),
        "shift": np.array(-1e3, np.float32),
    }
    before = dict(constants)
    graph = make_graph([node("Relu", ["x"], ["y"])], constants)
    assert set(soften_masks(graph)) == {"mask", "lowest"}
    assert graph.constants["mask"].tolist() == [0, -FP16_MAX / 2]
    for name in ("infinite", "weights", "shift"):
        np.testing.assert_array_equal(graph.constants[name], before[name])


def test_infinity_that_is_meant_stays():
    graph = make_graph([node("Add", ["x", "mask"], ["y"])], {"mask": np.array(-np.inf, np.float32)})
    assert convert(graph).clipped == {}
    assert (run(graph, x=np.zeros((1, 4, 8, 8), np.float32))[0] == -np.inf).all()


def test_an_epsilon_does_not_become_zero():
    nodes = [
        node("Sub", ["x", "x"], ["zero"]),
        node("Add", ["zero", "eps"], ["e"]),
        node("Div", ["zero", "e"], ["y"]),
    ]
    graph = make_graph(nodes, {"eps": np.array(1e-12, np.float32)})
    convert(graph)
    assert (run(graph, x=randn(1, 4, 8, 8))[0] == 0).all()


@pytest.mark.parametrize("value", [65504.0, 65519.0, 1e38, 3e-8, 1e-30, 5.96e-8, 0.1])
def test_every_finite_constant_stays_finite_and_nonzero(value):
    array = np.array([value, -value], np.float32)
    graph = make_graph([node("Add", ["x", "k"], ["y"])], {"k": array}, {"x": [2]})
    convert(graph)
    (converted,) = (a for a in graph.constants.values() if a.dtype == np.float16)
    assert FP16_LEAST <= converted[0] == -converted[1] <= FP16_MAX


def test_sizes_of_a_resize_stay_float32():
    nodes = [node("Resize", ["x", "", "scales"], ["y"], mode="nearest")]
    graph = make_graph(nodes, {"scales": np.array([1, 1, 2, 2], np.float32)})
    assert convert(graph).kept == []
    resize = next(n for n in graph.nodes if n.op_type == "Resize")
    assert graph.constants[resize.input[2]].dtype == np.float32
    assert run(graph, x=randn(1, 4, 8, 8))[0].shape == (1, 4, 16, 16)


def test_operators_whose_attribute_names_the_type_follow():
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("ConstantOfShape", ["shape"], ["ones"], value=helper.make_tensor("v", FLOAT, [1], [1.0])),
        node("Cast", ["shape"], ["sizes"], to=FLOAT),
        node("ReduceMax", ["sizes"], ["largest"], keepdims=0),
        node("Add", ["ones", "largest"], ["sum"]),
        node("Add", ["sum", "x"], ["y"]),
    ]
    graph = make_graph(nodes)
    assert convert(graph).kept == []
    x = randn(1, 4, 8, 8)
    np.testing.assert_allclose(run(graph, x=x)[0], x + 9, atol=1e-2)
    shape = next(n for n in graph.nodes if n.op_type == "Shape")
    assert shape.input[0] == "x"


def test_an_operator_without_the_type_stays_in_float32():
    graph = make_graph(
        [
            node("Relu", ["x"], ["r"]),
            node("Range", ["start", "limit", "delta"], ["range"]),
            node("Add", ["r", "range"], ["y"]),
        ],
        {
            "start": np.array(0, np.float32),
            "limit": np.array(8, np.float32),
            "delta": np.array(1, np.float32),
        },
    )
    (kept,) = convert(graph).kept
    assert kept.operator == "Range"
    assert "no tensor(float16) form" in kept.reason
    run(graph, x=randn(1, 4, 8, 8))


def test_an_operator_of_another_domain_stays_in_float32():
    nodes = [
        node("Relu", ["x"], ["r"]),
        helper.make_node("Gelu", ["r"], ["y"], name="gelu", domain="com.microsoft"),
    ]
    graph = make_graph(nodes, shape=[1, 4, 8, 8])
    graph.opsets["com.microsoft"] = 1
    (kept,) = convert(graph).kept
    assert "no operator of ONNX" in kept.reason
    assert run(graph, x=randn(1, 4, 8, 8))[0].dtype == np.float32


def test_a_graph_inside_a_node_keeps_what_it_reads():
    branch = [
        helper.make_graph([node("Neg" if name == "t" else "Identity", ["r"], [name])], name, [],
                          [helper.make_tensor_value_info(name, FLOAT, None)])
        for name in "te"
    ]  # fmt: skip
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("If", ["yes"], ["i"], then_branch=branch[0], else_branch=branch[1]),
        node("Neg", ["i"], ["y"]),
    ]
    graph = make_graph(nodes, {"yes": np.array(True)})
    assert {entry.operator for entry in convert(graph).kept} == {"Relu", "If"}
    x = randn(1, 4, 8, 8)
    np.testing.assert_allclose(run(graph, x=x)[0], np.maximum(x, 0), atol=1e-2)


def test_normalization_keeps_its_statistics_in_float32():
    nodes = [node("LayerNormalization", ["x", "scale"], ["y", "mean"], axis=-1)]
    graph = make_graph(nodes, {"scale": np.ones(8, np.float32)}, outputs=("y", "mean"))
    convert(graph)
    run(graph, x=randn(1, 4, 8, 8))
    assert types_of(graph)["mean"] == FLOAT


@pytest.mark.parametrize("opset", [17, 19])
def test_quantizers_take_fp16_scales_from_opset_19_on(opset):
    constants = {"s": np.array(0.05, np.float32), "z": np.array(0, np.int8)}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    graph = make_graph(nodes, constants, opset=opset)
    kept = convert(graph).kept
    assert bool(kept) is (opset == 17)
    scale = next(n for n in graph.nodes if n.op_type == "QuantizeLinear").input[1]
    assert graph.constants[scale].dtype == (np.float32 if kept else np.float16)
    run(graph, x=randn(1, 4, 8, 8))


def test_a_scale_that_fp16_cannot_hold_stays_float32():
    constants = {"s": np.array(1e-7, np.float32), "z": np.array(0, np.int8)}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    graph = make_graph(nodes, constants, opset=19)
    assert [entry.operator for entry in convert(graph).kept] == ["QuantizeLinear", "DequantizeLinear"]


def test_names_do_not_collide():
    nodes = [node("Relu", ["x"], ["x_fp16"]), node("Add", ["x", "x_fp16"], ["y"])]
    graph = make_graph(nodes)
    convert(graph)
    x = randn(1, 4, 8, 8)
    np.testing.assert_allclose(run(graph, x=x)[0], x + np.maximum(x, 0), atol=1e-2)


def test_float_tensors_are_what_can_be_observed():
    graph = make_graph([node("Shape", ["x"], ["shape"]), node("Relu", ["x"], ["y"])])
    assert float_tensors(graph) == ["x", "y"]


class Everything(nn.Module):
    """Convolution, pooling, upsampling, normalization, attention with a mask, and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, image):
        x = nn.functional.silu(self.stem(image))
        low = nn.functional.max_pool2d(self.down(x), 2)
        x = x + self.up(nn.functional.interpolate(low, scale_factor=2.0, mode="bilinear"))
        tokens = self.norm(nn.functional.adaptive_avg_pool2d(x, 4).flatten(2).transpose(1, 2))
        mask = torch.full((16, 16), -1e9).triu(1)
        tokens = tokens + self.attention(tokens, tokens, tokens, attn_mask=mask, need_weights=False)[0]
        return torch.softmax(self.head(tokens.mean(1)), -1)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("everything") / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Everything().eval(), (torch.randn(1, 3, 16, 16),), path, opset_version=17, dynamo=False,
            input_names=["image"], output_names=["y"],
        )  # fmt: skip
    return path


@pytest.mark.parametrize(("precision", "atol"), [(Precision.FP16, 2e-3), (Precision.BF16, 2e-2)])
def test_a_network_of_many_operators_converts_whole(everything, precision, atol):
    image = randn(1, 3, 16, 16)
    (expected,) = run(Graph.load(everything), image=image)
    graph, report = convert_all(Graph.load(everything), precision, [{"image": image}])
    assert report.kept == []
    assert list(report.clipped.values()) == ([pytest.approx(1e9)] if precision is Precision.FP16 else [])
    assert {n.op_type for n in graph.nodes} >= {
        "Conv",
        "ConvTranspose",
        "Resize",
        "MaxPool",
        "LayerNormalization",
    }
    if precision is Precision.BF16:
        onnx.checker.check_model(graph.to_model(), full_check=True)
        graph = emulate_bf16(graph)
    (actual,) = run(graph, image=image)
    np.testing.assert_allclose(actual, expected, atol=atol)
    assert (actual != expected).any()


def test_bf16_needs_the_opset_that_has_it(everything):
    image = randn(1, 3, 16, 16)
    graph, _ = convert_all(Graph.load(everything), Precision.BF16, [{"image": image}])
    assert graph.opsets[""] == 22
    assert at_opset(graph, 17) is graph
    emulated = emulate_bf16(graph)
    rounded = [
        n for n in emulated.nodes if n.op_type == "Cast" and attribute(n, "to") == TensorProto.BFLOAT16
    ]
    assert len(rounded) > 10
