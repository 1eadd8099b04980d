"""Layer tables from both schemas of the inspector, written here by hand in its form, with figures of our own."""

import json

import pytest

from jetway.tasks.on_device import layers
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.tensorrt_engine import inspector

CONV = "stem.weight + QuantizeLinear_3 + Conv_5 + PWN(Relu_6)"
REFORMAT = "Reformatting CopyNode for Input Tensor 0 to Conv_9"

OLD = {
    "Layers": [
        {
            "Name": CONV,
            "LayerType": "CaskConvolution",
            "Inputs": [
                {
                    "Name": "image",
                    "Location": "Device",
                    "Dimensions": [1, 3, 32, 32],
                    "Format/Datatype": "Four wide channel vectorized row major Int8 format",
                }
            ],
            "Outputs": [
                {
                    "Name": "stem",
                    "Location": "Device",
                    "Dimensions": [1, 8, 32, 32],
                    "Format/Datatype": "Thirty-two wide channel vectorized row major FP16 format",
                }
            ],
            "Weights": {"Type": "Int8", "Count": 216},
            "Bias": {"Type": "Float", "Count": 8},
            "TacticName": "a_tactic",
            "Metadata": "[ONNX Layer: Conv_5]\x1f[ONNX Layer: Relu_6]",
        },
        {
            "Name": REFORMAT,
            "LayerType": "Reformat",
            "Inputs": [
                {"Name": "stem", "Dimensions": [1, 8, 32, 32], "Format/Datatype": "Row major linear FP32"}
            ],
            "Outputs": [
                {"Name": "r", "Dimensions": [1, 8, 32, 32], "Format/Datatype": "Row major linear FP16"}
            ],
        },
        {"Name": "Conv_9", "LayerType": "CaskConvolution", "Inputs": [], "Outputs": []},
    ],
    "Bindings": ["image", "logits"],
}
NEW = {
    "Layers": [
        {
            "Name": CONV,
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "image", "Dimensions": [1, 3, 32, 32], "Format": "CHW4", "DataType": "Int8"}],
            "Outputs": [
                {"Name": "stem", "Dimensions": [1, 8, 32, 32], "Format": "CHW32", "Datatype": "Half"}
            ],
        }
    ],
    "I/O Tensors": [{"Name": "image", "IOMode": "Input", "DataType": "Float"}],
}


def times(*runs):
    return [[(CONV, one), (REFORMAT, two), ("Conv_9", three)] for one, two, three in runs]


def test_the_older_schema_tells_format_and_type_in_one_text():
    table = layers.table(OLD, times((0.2, 0.1, 0.1), (0.4, 0.1, 0.1), (0.3, 0.1, 0.1)))
    first, second, third = table
    assert (first["name"], first["type"], first["tactic"]) == (CONV, "CaskConvolution", "a_tactic")
    assert first["precision"] == "int8"
    assert first["format"] == "Thirty-two wide channel vectorized row major FP16 format"
    assert first["onnx_nodes"] == ["Conv_5", "Relu_6"]
    assert first["inputs"] == [
        {
            "name": "image",
            "shape": [1, 3, 32, 32],
            "dtype": "int8",
            "format": "Four wide channel vectorized row major Int8 format",
        }
    ]
    assert second["precision"] == "mixed"
    assert third["precision"] is None
    assert [row["time_ms"] for row in table] == [0.3, 0.1, 0.1]
    assert [row["share_ratio"] for row in table] == pytest.approx([0.6, 0.2, 0.2])


def test_the_newer_schema_tells_them_apart():
    (row,) = layers.table(NEW, [])
    assert row["inputs"][0] == {
        "name": "image", "shape": [1, 3, 32, 32], "dtype": "int8", "format": "CHW4",
    }  # fmt: skip
    assert row["outputs"][0]["dtype"] == "fp16"
    assert (row["format"], row["precision"], row["time_ms"]) == ("CHW32", "mixed", None)


def test_names_alone_are_a_table_too():
    table = layers.table({"Layers": [CONV, "Conv_9"]}, [[(CONV, 1.0), ("Conv_9", 3.0)]])
    assert [(row["name"], row["type"], row["share_ratio"]) for row in table] == [
        (CONV, None, 0.25),
        ("Conv_9", None, 0.75),
    ]


def test_an_engine_without_an_inspector_has_times():
    assert [row["time_ms"] for row in layers.table(None, times((1.0, 2.0, 3.0)))] == [1.0, 2.0, 3.0]


def test_layers_of_one_name_are_told_apart_by_their_order():
    information = {"Layers": [{"Name": "copy", "LayerType": kind} for kind in ("NoOp", "Reformat")]}
    runs = [[("copy", 1.0), ("conv", 5.0), ("copy", 2.0)], [("copy", 1.2), ("conv", 5.0), ("copy", 2.2)]]
    table = layers.table(information, runs)
    assert [(row["name"], row["type"], row["time_ms"]) for row in table] == [
        ("copy", "NoOp", 1.1),
        ("conv", None, 5.0),
        ("copy", "Reformat", 2.1),
    ]


def test_layers_that_were_never_timed_come_last():
    table = layers.table(OLD, [[("Conv_9", 2.0)]])
    assert [(row["name"], row["time_ms"], row["share_ratio"]) for row in table] == [
        ("Conv_9", 2.0, 1.0),
        (CONV, None, None),
        (REFORMAT, None, None),
    ]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Row major linear FP32", "fp32"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("Row major Int8 format, uint8 packed", "uint8"),
        ("BFloat16", "bf16"),
        ("BF16", "bf16"),
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("FP8E4M3", "fp8"),
        ("Int64", "int64"),
        ("Bool", "bool"),
        ("N/A due to dynamic shapes", None),
        (None, None),
    ],
)
def test_types_in_tensorrts_words(text, name):
    assert layers.data_type(text) == name


def test_what_the_inspector_writes_is_read_though_it_holds_control_characters():
    assert inspector.parsed('{"Layers": ["a\x1fb"]}') == {"Layers": ["a\x1fb"]}
    assert inspector.parsed(json.dumps(OLD)) == OLD
    with pytest.raises(DeviceError, match="no JSON"):
        inspector.parsed("{")
