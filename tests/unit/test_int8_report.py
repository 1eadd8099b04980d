"""The int8 report on layer tables such as TensorRT's inspector and profiler give."""

import json

import pytest

from jetway.tasks.int8_report import (
    ADDED,
    FLOAT,
    FUSION,
    QUANTIZER,
    REFORMAT,
    SLOWER,
    compare_layers,
    report_markdown,
)
from jetway.tasks.layer_table import Layer, layers_csv, node_names


def layer(name, time_ms, precision="int8", kind="CaskConvolution"):
    return Layer(name=name, time_ms=time_ms, precision=precision, type=kind)


def quantized(weight, node):
    """As TensorRT names a convolution with its weight's quantizer."""
    return f"{weight} + /{weight}/QuantizeLinear + {node}"


FP16 = [
    layer("/stem/Conv + PWN(/stem/Relu)", 0.10, "fp16"),
    layer("/body/conv1/Conv + PWN(/body/Relu)", 0.20, "fp16"),
    layer("/body/conv2/Conv + /body/Add + PWN(/body/Relu_1)", 0.20, "fp16"),
    layer("/wide/Conv", 0.05, "fp16"),
    layer("/head/Gemm", 0.04, "fp16"),
]
INT8 = [
    layer("/input_quantizer/QuantizeLinear", 0.02, "fp32", "Scale"),
    layer("/late/QuantizeLinear", 0.01, "mixed", "Reformat"),
    layer("head_cast", 0.015, "mixed", "Cast"),
    layer(quantized("w0", "/stem/Conv + PWN(/stem/Relu)"), 0.05),
    layer(quantized("w1", "/body/conv1/Conv + PWN(/body/Relu)"), 0.10),
    layer(
        "Reformatting CopyNode for Input Tensor 1 to /body/Add + PWN(/body/Relu_1)", 0.03, "fp32", "Reformat"
    ),
    layer(quantized("w2", "/body/conv2/Conv"), 0.12),
    layer("/body/Add + PWN(/body/Relu_1)", 0.09, "fp32"),
    layer(quantized("w3", "/wide/Conv"), 0.08),
    layer("/head/Gemm", 0.041, "fp32"),
]


@pytest.fixture
def report():
    return compare_layers("pruned-fp16", FP16, "pruned-int8-qat", INT8)


def group(report, node):
    return next(group for group in report.groups if node in group.nodes)


@pytest.mark.parametrize(
    ("fused", "names"),
    [
        ("conv1", ["conv1"]),
        ("conv1 + relu1", ["conv1", "relu1"]),
        ("conv1 + PWN(relu1)", ["conv1", "relu1"]),
        ("PWN(PWN(sigmoid), mul)", ["sigmoid", "mul"]),
        ("conv1 || conv2", ["conv1", "conv2"]),
        ("{ForeignNode[norm/Add...head/MatMul]}", ["norm/Add", "head/MatMul"]),
        ("", []),
    ],
)
def test_fused_names_come_apart(fused, names):
    assert node_names(fused) == names


def test_groups_hold_every_layer_once(report):
    assert sorted(name for g in report.groups for name in g.int8_layers) == sorted(one.name for one in INT8)
    assert sorted(name for g in report.groups for name in g.fp16_layers) == sorted(one.name for one in FP16)
    assert sum(g.int8_ms for g in report.groups) == pytest.approx(report.int8_ms)
    assert sum(g.fp16_ms for g in report.groups) == pytest.approx(report.fp16_ms)


def test_a_group_names_the_nodes_of_both_and_no_weights(report):
    assert group(report, "/stem/Conv").nodes == ("/stem/Conv", "/stem/Relu")


def test_what_int8_won_has_no_reasons(report):
    won = group(report, "/stem/Conv")
    assert won.lost_ms == pytest.approx(-0.05)
    assert won.reasons == ()


def test_a_residual_add_that_did_not_fuse_is_told_with_its_reformat(report):
    broken = group(report, "/body/Add")
    assert set(broken.reasons) == {REFORMAT, FLOAT, FUSION}
    assert len(broken.int8_layers) == 3
    assert broken.lost_ms == pytest.approx(0.04)


def test_an_int8_kernel_that_is_slower_is_told(report):
    assert group(report, "/wide/Conv").reasons == (SLOWER,)


def test_a_layer_left_in_float_is_told(report):
    assert group(report, "/head/Gemm").reasons == (FLOAT,)


@pytest.mark.parametrize("name", ["/input_quantizer/QuantizeLinear", "/late/QuantizeLinear"])
def test_a_quantizer_of_its_own_is_told(report, name):
    """Some versions call it a reformat."""
    lone = next(g for g in report.groups if g.int8_layers == (name,))
    assert lone.reasons == (QUANTIZER,)


def test_a_layer_that_fp16_does_not_have_is_told(report):
    assert group(report, "head_cast").reasons == (ADDED,)


def test_time_is_summed_by_reason(report):
    assert report.lost_ms == pytest.approx(
        {REFORMAT: 0.03, QUANTIZER: 0.03, FLOAT: 0.041, FUSION: 0.04, SLOWER: 0.03, ADDED: 0.015}
    )


def test_the_greatest_loss_comes_first(report):
    assert [g.lost_ms for g in report.groups] == sorted((g.lost_ms for g in report.groups), reverse=True)


def test_differences_within_the_noise_are_no_losses():
    same = [layer("/stem/Conv", 0.1001)]
    (only,) = compare_layers("a", [layer("/stem/Conv", 0.1, "fp16")], "b", same).groups
    assert only.reasons == ()


def test_nodes_that_a_newer_engine_tells_come_before_the_names():
    fp16 = Layer(name="__myl_Conv_0", precision="fp16", time_ms=0.2, onnx_nodes=("/a/Conv", "/a/Relu"))
    int8 = Layer(name="__myl_Conv_7", precision="int8", time_ms=0.1, onnx_nodes=("/a/Conv",))
    (only,) = compare_layers("a", [fp16], "b", [int8]).groups
    assert only.nodes == ("/a/Conv",)


def test_the_report_is_json_and_a_page(report):
    document = json.loads(json.dumps(report.to_json()))
    assert document["groups"][0]["lost_ms"] == pytest.approx(report.groups[0].lost_ms)
    page = report_markdown(report, where="orin: NVIDIA Jetson AGX Orin")
    assert "1 layer int8" in page
    for text in (
        "pruned-int8-qat",
        "orin: NVIDIA",
        REFORMAT,
        FUSION,
        "/body/Add",
        "tensorrt.quantize_residuals",
    ):
        assert text in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


def test_an_int8_engine_that_lost_nothing_says_so():
    report = compare_layers("a", [layer("c", 0.2, "fp16")], "b", [layer("c", 0.1)])
    assert "Nothing was lost" in report_markdown(report, where="x")


def test_the_layer_table_is_a_csv():
    rows = layers_csv(INT8).splitlines()
    assert rows[0] == "name,type,precision,time_ms,share_ratio,onnx_nodes"
    assert len(rows) == 1 + len(INT8)
    assert layers_csv([Layer(name='a, "b"')]).splitlines()[1] == '"a, ""b""",,,,,"a, ""b"""'
