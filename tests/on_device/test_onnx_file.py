import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from jetway.tasks.on_device.onnx_file import OnnxFile


def save(path, nodes, weights=(), **options):
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [value], [out], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path, **options)
    return str(path)


def test_nodes_come_in_the_order_of_the_file(networks):
    expected = onnx.load(networks["conv"]).graph.node
    found = OnnxFile(str(networks["conv"])).nodes
    assert [(node["name"], node["operator"]) for node in found] == [(n.name, n.op_type) for n in expected]
    assert len(found) > 3


def test_a_custom_domain_is_kept(tmp_path):
    path = save(tmp_path / "a.onnx", [helper.make_node("Odd", ["x"], ["y"], name="odd", domain="my.own")])
    assert OnnxFile(path).nodes == [{"name": "odd", "operator": "Odd", "domain": "my.own"}]


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "fp16"), (np.float32, "fp32"), (np.int8, "int8")])
def test_types_are_those_of_weights(tmp_path, dtype, name):
    weight = numpy_helper.from_array(np.ones(4, dtype), "w")
    path = save(tmp_path / "a.onnx", [helper.make_node("Add", ["x", "w"], ["y"])], [weight])
    assert OnnxFile(path).types == {name}


def test_types_are_those_of_constants_and_casts_too(tmp_path):
    constant = numpy_helper.from_array(np.ones(4, np.float16))
    nodes = [
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.BFLOAT16),
    ]
    assert OnnxFile(save(tmp_path / "a.onnx", nodes)).types == {"fp16", "bf16"}


def test_types_of_weights_in_a_file_of_their_own(tmp_path):
    weight = numpy_helper.from_array(np.ones(4096, np.float16), "w")
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    path = save(
        tmp_path / "a.onnx", nodes, [weight], save_as_external_data=True, location="weights", size_threshold=0
    )
    assert (tmp_path / "weights").stat().st_size == 8192
    assert OnnxFile(path).types == {"fp16"}


@pytest.mark.parametrize("operator", ["QuantizeLinear", "DequantizeLinear"])
def test_quantizers_are_seen(tmp_path, operator):
    assert OnnxFile(save(tmp_path / "a.onnx", [helper.make_node(operator, ["x", "s"], ["y"])])).is_quantized()
    assert not OnnxFile(save(tmp_path / "b.onnx", [helper.make_node("Relu", ["x"], ["y"])])).is_quantized()


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_file_that_is_cut_off_is_no_error(tmp_path, networks, length):
    data = networks["conv"].read_bytes()[:length]
    (tmp_path / "cut.onnx").write_bytes(data)
    found = OnnxFile(str(tmp_path / "cut.onnx"))
    assert len(found.nodes) < len(onnx.load(networks["conv"]).graph.node) or length == -1


def test_a_file_that_is_no_onnx_is_no_error(tmp_path):
    (tmp_path / "text").write_bytes(b"this is no model" * 10)
    assert OnnxFile(str(tmp_path / "text")).nodes == []


def test_files_of_weights_are_found_in_branches_too(tmp_path):
    outer = numpy_helper.from_array(np.ones(4096, np.float32), "w")
    inner = numpy_helper.from_array(np.ones(4096, np.float16), "v")
    for tensor, location in ((outer, "outer.bin"), (inner, "inner.bin")):
        onnx.external_data_helper.set_external_data(tensor, location)
        tensor.data_location = TensorProto.EXTERNAL
    out = helper.make_tensor_value_info("b", TensorProto.FLOAT16, None)
    branch = helper.make_graph([helper.make_node("Identity", ["v"], ["b"])], "branch", [], [out], [inner])
    nodes = [
        helper.make_node("Add", ["x", "w"], ["y"]),
        helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch),
    ]
    graph = helper.make_graph(nodes, "graph", [], [], [outer])
    (tmp_path / "a.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    found = OnnxFile(str(tmp_path / "a.onnx"))
    assert found.external_paths == [str(tmp_path / "inner.bin"), str(tmp_path / "outer.bin")]
    assert found.types == {"fp32", "fp16"}
    assert [node["operator"] for node in found.nodes] == ["Add", "If"]
