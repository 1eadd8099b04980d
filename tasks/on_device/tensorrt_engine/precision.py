"""One recipe's precision on every version.

The ONNX file carries its precision: fp16 or bf16 weights, explicit Q/DQ for int8. TensorRT 11 and, asked for it by a
network flag, TensorRT 10 do as the file says (strong typing). Up to TensorRT 8 every precision that may be used is a
flag of the build, and TensorRT chooses among them. Calibration, and DLA up to 10.7, work with flags alone.
"""

from fnmatch import fnmatchcase
from typing import Any, Dict, List, Tuple

from jetway.tasks.on_device import errors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.onnx_file import OnnxFile
from jetway.tasks.on_device.tensorrt_engine import bindings

# What a precision needs of the build's flags, where there are any.
FLAGS_OF = {
    "fp32": set(),
    "fp16": {"FP16"},
    "bf16": {"BF16"},
    "int8": {"INT8"},
    "int8-calibrated": {"INT8"},
}  # type: Any


def check(options: Dict[str, Any], onnx: OnnxFile) -> None:
    """Raises DeviceError (bad_request) where the file cannot be what is asked for."""
    asked = options["precision"]
    if asked == "int8" and not onnx.is_quantized():
        raise _bad("int8 takes its ranges from Q/DQ nodes, and the ONNX file has none: use int8-calibrated")
    if asked == "int8-calibrated" and onnx.is_quantized():
        raise _bad("int8-calibrated takes a network without Q/DQ nodes, and the ONNX file has some: use int8")
    if asked in ("fp16", "bf16") and asked not in onnx.types and not has_flags():
        raise _bad(
            "TensorRT {} does as the ONNX file says, and that says nothing of {}: convert it on the host".format(
                bindings.module().__version__, asked
            )
        )


def has_flags() -> bool:
    """Whether this version knows weak typing at all."""
    return bindings.member("BuilderFlag", "FP16") is not None


def network_flags(options: Dict[str, Any], onnx: OnnxFile) -> Tuple[int, bool]:
    """The flags to create the network with, and whether it will be strongly typed."""
    strongly_typed = bindings.member("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")
    explicit_batch = bindings.member("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH")
    if not has_flags():
        return 0, True
    if strongly_typed is None:
        return 0 if explicit_batch is None else 1 << int(explicit_batch), False
    if options["dla"] or not _carried(options["precision"], onnx):
        return 0, False
    return 1 << int(strongly_typed), True


def _carried(precision: str, onnx: OnnxFile) -> bool:
    return precision in ("fp32", "int8") or precision in onnx.types


def needed_flags(options: Dict[str, Any], onnx: OnnxFile) -> List[str]:
    """The precisions that a weakly typed build must allow: the recipe's, and those that the file has."""
    precisions = {options["precision"]} | set(options["mixed"].values()) | onnx.types & {"fp16", "bf16"}
    if options["precision"].startswith("int8"):
        precisions.add(options["int8_rest"])
    return sorted(set().union(*(FLAGS_OF[precision] for precision in precisions)))


def set_flags(config: Any, names: List[str]) -> None:
    flags = {
        "FP16": bindings.member("BuilderFlag", "FP16"),
        "BF16": bindings.member("BuilderFlag", "BF16"),
        "INT8": bindings.member("BuilderFlag", "INT8"),
    }
    for name in names:
        if flags[name] is None:
            raise bindings.absent("{} flag".format(name), "variants", "Use fp16, which every version has.")
        config.set_flag(flags[name])


def set_tf32(config: Any, allowed: bool) -> None:
    """fp32 layers use TF32's ten bits of mantissa unless told otherwise."""
    flag = bindings.module().BuilderFlag.TF32
    if allowed:
        config.set_flag(flag)
    else:
        config.clear_flag(flag)


def keep(network: Any, config: Any, mixed: Dict[str, str]) -> Dict[str, List[str]]:
    """Holds layers of a weakly typed network at a precision; returns the layers of each glob."""
    layers = [network.get_layer(index) for index in range(network.num_layers)] if mixed else []
    kept = {}
    for glob, precision in mixed.items():
        matching = [layer for layer in layers if fnmatchcase(layer.name, glob)]
        kept[glob] = [layer.name for layer in matching if _hold(layer, data_type(precision))]
    if any(kept.values()):
        _insist(config)
    return kept


def _insist(config: Any) -> None:
    obey = bindings.member("BuilderFlag", "OBEY_PRECISION_CONSTRAINTS")
    strict = bindings.member("BuilderFlag", "STRICT_TYPES")  # 8.0
    if obey is not None:
        config.set_flag(obey)
    elif strict is not None:
        config.set_flag(strict)


def data_type(precision: str) -> Any:
    data_types = bindings.module().DataType
    bf16 = bindings.member("DataType", "BF16")
    if precision == "bf16" and bf16 is None:
        raise bindings.absent("bf16", "tensorrt.mixed", "Use fp32 or fp16 there.")
    return {"fp32": data_types.FLOAT, "fp16": data_types.HALF, "bf16": bf16}[precision]


def _hold(layer: Any, precision: Any) -> bool:
    """Sets the layer's precision where it computes with floats; what the network returns keeps its type."""
    outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
    if not _computes_floats(layer, outputs):
        return False
    if bindings.has(layer, "precision"):
        layer.precision = precision
    for index, tensor in enumerate(outputs):
        if not tensor.is_network_output and bindings.has(layer, "set_output_type"):
            layer.set_output_type(index, precision)
    return True


def _computes_floats(layer: Any, outputs: List[Any]) -> bool:
    trt = bindings.module()
    untouched = (
        trt.LayerType.QUANTIZE,
        trt.LayerType.DEQUANTIZE,
        trt.LayerType.CONSTANT,
        trt.LayerType.SHAPE,
    )
    floats = (trt.DataType.FLOAT, trt.DataType.HALF, bindings.member("DataType", "BF16"))
    return layer.type not in untouched and all(
        tensor.is_execution_tensor and tensor.dtype in floats for tensor in outputs
    )


def slow_precisions(builder: Any, needed: List[str]) -> List[str]:
    """Flags of the build that this GPU has no fast kernels for, where the version can tell."""
    fast = {}  # type: Dict[str, bool]
    if bindings.has(builder, "platform_has_fast_fp16"):
        fast["FP16"] = builder.platform_has_fast_fp16
    if bindings.has(builder, "platform_has_fast_int8"):
        fast["INT8"] = builder.platform_has_fast_int8
    return [name for name in needed if not fast.get(name, True)]


def _bad(text: str) -> DeviceError:
    return DeviceError("variants: {}.".format(text), errors.BAD_REQUEST)
