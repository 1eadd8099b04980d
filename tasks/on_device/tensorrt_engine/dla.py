"""Placing layers on the deep-learning accelerator of Xavier and Orin, and telling where each went and why."""

import re
from fnmatch import fnmatchcase
from typing import Any, Dict, List

from jetway.tasks.on_device import errors
from jetway.tasks.on_device.errors import DeviceError
from jetway.tasks.on_device.onnx_file import OnnxFile
from jetway.tasks.on_device.tensorrt_engine import bindings, precision

DLA, GPU = "DLA", "GPU"
PRECISIONS = ("fp16", "int8", "int8-calibrated")
SHOWN = 20


def check(builder: Any, options: Dict[str, Any], onnx: OnnxFile, static: bool) -> None:
    """Raises DeviceError for what no DLA, or not this one, can do."""
    _check_core(options["dla"]["core"], builder.num_DLA_cores)
    if options["precision"] not in PRECISIONS:
        raise _bad("A DLA computes fp16 and int8 alone, and the variant is {}".format(options["precision"]))
    if not static:
        raise _bad("A DLA takes one shape: give min, opt and max of tensorrt.profiles the same")
    if onnx.is_quantized() and precision.has_flags():
        raise _bad("The DLA of this TensorRT takes no Q/DQ nodes: use an int8-calibrated variant")


def _check_core(core: int, cores: int) -> None:
    if core >= cores:
        raise DeviceError(
            "tensorrt.dla.core is {}, and TensorRT {} finds {} DLA cores here. Leave out tensorrt.dla, or name "
            "another core.".format(core, bindings.module().__version__, cores),
            errors.MISMATCH,
        )


def place(network: Any, config: Any, asked: Dict[str, Any]) -> List[Dict[str, str]]:
    """Puts every layer where it is asked to go and can go.

    Returns for each ``layer`` its ``asked`` and ``device`` (DLA or GPU), and a ``reason`` where they differ. Raises
    DeviceError where one cannot run on the DLA and may not fall back.
    """
    trt = bindings.module()
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = asked["core"]
    if asked["gpu_fallback"]:
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    placement = [_place(config, layer, wanted_device(layer.name, asked["layers"])) for layer in layers]
    stranded = [entry["layer"] for entry in placement if entry["device"] != entry["asked"]]
    if stranded and not asked["gpu_fallback"]:
        raise DeviceError(
            "The DLA cannot run {} of {} layers: {}. Set tensorrt.dla.gpu_fallback, or name them in "
            "tensorrt.dla.layers.".format(len(stranded), len(layers), ", ".join(stranded[:SHOWN])),
            errors.BUILD_FAILED,
            "unsupported_operator",
        )
    return placement


def wanted_device(name: str, globs: Dict[str, str]) -> str:
    """The last glob that matches decides; the DLA otherwise."""
    matching = [device for glob, device in globs.items() if fnmatchcase(name, glob)]
    return matching[-1] if matching else DLA


def _place(config: Any, layer: Any, asked: str) -> Dict[str, str]:
    devices = bindings.module().DeviceType
    if asked == GPU:
        config.set_device_type(layer, devices.GPU)
        return {"layer": layer.name, "asked": GPU, "device": GPU, "reason": "tensorrt.dla.layers"}
    if not config.can_run_on_DLA(layer):
        config.set_device_type(layer, devices.GPU)
        return {"layer": layer.name, "asked": DLA, "device": GPU, "reason": "the DLA cannot run it"}
    config.set_device_type(layer, devices.DLA)
    return {"layer": layer.name, "asked": DLA, "device": DLA, "reason": ""}


def with_words(placement: List[Dict[str, str]], warnings: List[str]) -> List[Dict[str, str]]:
    """The placement, with what TensorRT said about each layer that fell back."""
    return [dict(entry, reason=_words_about(entry, warnings)) for entry in placement]


def _words_about(entry: Dict[str, str], warnings: List[str]) -> str:
    if entry["device"] == entry["asked"]:
        return entry["reason"]
    whole_name = re.compile(r"(?<![\w/]){}(?![\w/])".format(re.escape(entry["layer"])))
    said = [text for text in warnings if "DLA" in text and whole_name.search(text)]
    return "; ".join(said) or entry["reason"]


def _bad(text: str) -> DeviceError:
    return DeviceError(text + " (tensorrt.dla).", errors.BAD_REQUEST)
